"""The features of one cached example, and how an extractor's output becomes one.

Dimension letters: R regions of one picture, F raw frames of one clip, K image codes, L word pieces.

| feature         | shape    | dtype          | meaning |
|-----------------|----------|----------------|---|
| id              |          | text           | the triplet's name |
| caption         |          | text           | "" when absent |
| references      |          | text           | JSON list of all reference captions |
| labels          | [n]      | int32          | multi-label classes, 0-based |
| text_ids        | [L]      | int32          | [CLS] word pieces [SEP]; empty when absent |
| region_features | [R, Dv]  | feature_dtype  | valid regions only |
| region_boxes    | [R, 7]   | float32        | x1, y1, x2, y2, w, h, w*h relative to the image size |
| region_classes  | [R]      | int32          | best class other than the background, 1-based |
| region_scores   | [R]      | float32        | its score |
| audio_features  | [F, D]   | feature_dtype  | raw frames; stacking happens at loading |
| image_codes     | [K]      | int32          | codes of the dVAE; empty when absent, or without pixels |
| present         | [3]      | bool           | text, image, audio |
| index           |          | int32          | row in the source |
"""

import dataclasses
import functools
import json
import zlib
from collections.abc import Mapping

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from opt_jax.cache.wire import byte_values

TEXT, IMAGE, AUDIO = 0, 1, 2
TEXT_FEATURES = ("id", "caption", "references")
MODALITIES = ("text", "image", "audio")
FIELDS = {
    TEXT: ("text_ids",),
    IMAGE: ("region_features", "region_boxes", "region_classes", "region_scores", "image_codes"),
    AUDIO: ("audio_features",),
}


@dataclasses.dataclass(frozen=True)
class Quarantine:
    """What an extractor returns in place of a row it cannot use; `reason` goes into quarantine.jsonl."""

    reason: str


@dataclasses.dataclass(frozen=True)
class Schema:
    """Sizes and dtypes of the arrays in a cache.

    region_size: Dv, width of a region's feature.
    region_classes: number of classes of masked region classification, the background (0) included.
    audio_size: D, width of a raw audio frame.
    num_codes: K, codes of one picture.
    cls_id: id of [CLS], which stands alone in a row whose text is absent.
    feature_dtype: 'float16' or 'bfloat16', of region features and audio frames.
    """

    region_size: int
    region_classes: int
    audio_size: int
    num_codes: int
    cls_id: int
    feature_dtype: str = "float16"

    def __post_init__(self):
        if self.feature_dtype not in ("float16", "bfloat16"):
            raise ValueError(f"feature_dtype is {self.feature_dtype!r}; use 'float16' or 'bfloat16'")

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(tensors(self)["region_features"][1])


@functools.lru_cache(maxsize=8)
def tensors(schema: Schema) -> dict[str, tuple[tuple[int | None, ...], type]]:
    """Shape and dtype of every array feature; None is a length that differs from row to row."""
    if schema.feature_dtype == "float16":
        feature_dtype = np.float16
    else:
        import ml_dtypes

        feature_dtype = ml_dtypes.bfloat16
    return {
        "labels": ((None,), np.int32),
        "text_ids": ((None,), np.int32),
        "region_features": ((None, schema.region_size), feature_dtype),
        "region_boxes": ((None, 7), np.float32),
        "region_classes": ((None,), np.int32),
        "region_scores": ((None,), np.float32),
        "audio_features": ((None, schema.audio_size), feature_dtype),
        "image_codes": ((None,), np.int32),
        "present": ((3,), np.bool_),
        "index": ((), np.int32),
    }


@functools.lru_cache(maxsize=8)
def features(schema: Schema) -> tfds.features.FeaturesDict:
    """The TensorFlow Datasets features; arrays are raw bytes, many times faster than lists of numbers."""
    return tfds.features.FeaturesDict(
        {name: tfds.features.Text() for name in TEXT_FEATURES}
        | {
            name: tfds.features.Tensor(shape=shape, dtype=dtype, encoding="bytes")
            for name, (shape, dtype) in tensors(schema).items()
        }
    )


def serialize(example: Mapping, schema: Schema) -> bytes:
    """Bytes of one example, the same for equal examples."""
    connector = features(schema)
    serializer = ExampleSerializer(connector.get_serialized_info())
    return serializer.get_tf_example(connector.encode_example(example)).SerializeToString(deterministic=True)


def deserialize(record: bytes, schema: Schema) -> dict:
    """One example from its bytes: arrays (read-only), and str for the text features.

    The arrays are views of the record, so one that is kept keeps the whole record in memory.

    Raises KeyError, naming the feature, when the record lacks one; ValueError when it is no record of these.
    """
    stored = byte_values(record)
    specifications = tensors(schema)
    missing = [name for name in (*TEXT_FEATURES, *specifications) if name not in stored]
    if missing:
        raise KeyError(f"the record lacks {', '.join(missing)}")
    example = {name: record[slice(*stored[name])].decode() for name in TEXT_FEATURES}
    whole = memoryview(record)
    for name, (shape, dtype) in specifications.items():
        values = np.frombuffer(whole[slice(*stored[name])], dtype)
        example[name] = values.reshape([-1 if size is None else size for size in shape])
    return example


def caption_key(caption: str | None, row_id: str) -> int:
    """31-bit key, equal for equal captions up to case, spaces and the last full stop.

    A row without a caption gets a key of its own, so that two of them do not count as equal.
    """
    text = " ".join((caption or "").lower().split()).rstrip(".")
    return zlib.crc32((text or f"\0{row_id}").encode()) & 0x7FFFFFFF


def make_example(triplet, extracted: Mapping, row: int, schema: Schema) -> dict | Quarantine:
    """Joins a triplet and what was extracted from it into one example of the schema.

    Features are cast to the schema's dtypes. A row is set aside when a present modality came out empty or
    with a value that is not finite (after the cast). Raises ValueError when the extractor broke its
    contract: a field of a present modality is missing, a field of an absent one is not empty, or a shape is
    not the schema's.
    """
    present = np.array([bool(triplet.caption), triplet.has_image, triplet.audio is not None])
    example = {
        "id": triplet.id,
        "caption": triplet.caption or "",
        "references": json.dumps(list(triplet.references)),
        "labels": np.asarray(triplet.labels, np.int32),
        "present": present,
        "index": np.int32(row),
    }
    specifications = tensors(schema)
    for modality, names in FIELDS.items():
        for name in names:
            shape, dtype = specifications[name]
            if not present[modality]:
                if len(extracted.get(name, ())):
                    raise ValueError(
                        f"{triplet.id}: {name} is not empty, but there is no {MODALITIES[modality]}"
                    )
                example[name] = np.zeros([size or 0 for size in shape], dtype)
                continue
            if name not in extracted:
                raise ValueError(f"{triplet.id}: the extractor returned no {name}")
            with np.errstate(over="ignore"):
                value = np.asarray(extracted[name]).astype(dtype)
            if value.ndim != len(shape) or value.shape[1:] != shape[1:]:
                raise ValueError(f"{triplet.id}: {name} has shape {value.shape}, expected {shape}")
            if not len(value) and not (name == "image_codes" and triplet.image is None):
                return Quarantine(f"{name} is empty")
            if value.dtype.kind not in "iu" and not np.isfinite(value.astype(np.float32)).all():
                return Quarantine(f"{name} is not finite as {np.dtype(dtype).name}")
            example[name] = value
    if present[IMAGE]:
        _check_image(example, schema)
    return example


def _check_image(example: Mapping, schema: Schema) -> None:
    counts = {name: len(example[name]) for name in FIELDS[IMAGE] if name.startswith("region_")}
    if len(set(counts.values())) != 1:
        raise ValueError(f"{example['id']}: numbers of regions differ: {counts}")
    if len(example["image_codes"]) not in (0, schema.num_codes):
        raise ValueError(
            f"{example['id']}: {len(example['image_codes'])} image_codes, expected {schema.num_codes}"
        )
    classes = example["region_classes"]
    if classes.min() < 1 or classes.max() >= schema.region_classes:
        raise ValueError(
            f"{example['id']}: region_classes from {classes.min()} to {classes.max()}, "
            f"expected 1 to {schema.region_classes - 1}"
        )
