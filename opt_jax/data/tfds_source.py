"""Any data set of TensorFlow Datasets that lies on the disk in ArrayRecord files; TensorFlow is not needed.

tfds:coco_captions,data_dir=FOLDER,image=image,caption=captions/text,id=image/id
"""

import hashlib
from collections.abc import Mapping

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import read_only_builder

from opt_jax.data import decoding
from opt_jax.data.row import Row, row_of
from opt_jax.data.rows import PARTS, RowSource
from opt_jax.data.triplet import SourceError, UnusableSampleError

PREPARE = "tfds.builder(NAME).download_and_prepare(file_format='array_record')"


class TfdsSource(RowSource):
    """A split of a data set. `image`, `caption`, `audio`, `labels`, `id` and `group` name features.

    'captions/text' is the feature `text` within `captions`. Pictures and sound may be encoded files, or
    arrays: uint8 [h, w, 3]; float, or integers of 16 bits, [N], at `rate` samples a second. Of several
    captions the first is the caption, the others are references. Labels are class labels or texts, one or
    several. Without `id` samples are called by their number.

    Args:
      path: name of the data set: NAME, NAME/CONFIG or NAME/CONFIG:VERSION. split: in TFDS's words. data_dir:
        where it was prepared, TFDS's own default otherwise.
    """

    file_parts = ()  # it is told by its own description, see `fingerprint`

    def __init__(
        self,
        path,
        split,
        data_dir=None,
        image=None,
        caption=None,
        audio=None,
        labels=None,
        id=None,
        group=None,
        rate=decoding.SAMPLE_RATE,
        class_names=None,
    ):
        named = {
            "image": image,
            "caption": caption,
            "audio": audio,
            "labels": labels,
            "id": id,
            "group": group,
        }
        self._features = {field: feature for field, feature in named.items() if feature is not None}
        self.split, self.rate = split, int(rate)
        if not decoding.RATES[0] <= self.rate <= decoding.RATES[1]:
            raise SourceError(f"tfds:{path}: rate={rate} is not {decoding.RATES[0]} to {decoding.RATES[1]}")
        try:
            builder = read_only_builder.builder_from_files(str(path), data_dir=data_dir)
            features = builder.info.features
            # Decoded here instead, once it is known how large they are.
            pictures = [name for name in features if isinstance(features[name], tfds.features.Image)]
            skipped = {name: tfds.decode.SkipDecoding() for name in pictures}
            self._source = builder.as_data_source(split, decoders=skipped)
        except Exception as error:  # of all kinds, from a missing folder to a missing TensorFlow
            raise SourceError(
                f"tfds:{path}, split {split!r}, cannot be opened: {error}\nIt has to lie on the disk in"
                f" ArrayRecord files, as {PREPARE} makes them, without features of the type Audio."
            ) from error
        try:
            kinds = {field: _get(features, name) for field, name in self._features.items()}
        except KeyError as error:
            found = ", ".join(sorted(features))
            raise SourceError(f"tfds:{path} has no feature {error}; it has {found}") from error
        self._label = getattr(kinds.get("labels"), "feature", kinds.get("labels"))
        self._last = None, None
        digest = hashlib.sha256()
        for name in ("dataset_info.json", "features.json"):
            digest.update((builder.data_path / name).read_bytes())
        identity = {"info_sha256": digest.hexdigest(), "split": split, "rate": self.rate}
        super().__init__("tfds", {}, {**identity, "features": self._features}, class_names)

    def __len__(self) -> int:
        return len(self._source)

    def _look_through(self):
        known = self._label is None or isinstance(self._label, tfds.features.ClassLabel)
        if not known or {"id", "group"} & set(self._features):
            return super()._look_through()
        # Reading all records would tell nothing more.
        fields = {"image": "image", "audio": "audio", "caption": "text"}
        self.modalities.update(fields[field] for field in fields if field in self._features)
        self._named[:] = [part in self.modalities for part in PARTS]
        names = self._label.names if self._label else ()
        return np.zeros(0, np.int64), np.arange(1, len(self) + 1, dtype=np.uint64), set(names)

    def row(self, index: int) -> Row:
        example = self._example(index)
        values = {field: _get(example, name) for field, name in self._features.items()}
        sample_id, labels = f"{self.split}-{index}", values.pop("labels", None)
        try:
            files = {field: str(index) for field in ("image", "audio") if _holds(values.pop(field, None))}
            texts = {field: _texts(value) for field, value in values.items()}
            labels = [self._class_name(label) for label in _several(labels)]
        except (TypeError, ValueError) as error:
            raise UnusableSampleError(sample_id, "row", f"has features of another kind: {error}") from error
        captions = texts.pop("caption", [])
        texts = {field: "/".join(text) for field, text in texts.items()}
        return row_of({"id": sample_id, "labels": labels, "references": captions} | files | texts, sample_id)

    def _class_name(self, label) -> str:
        if isinstance(self._label, tfds.features.ClassLabel):
            return self._label.int2str(int(label))
        return _texts(label)[0]

    def _example(self, index: int) -> Mapping:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of split {self.split}: there are {len(self)}")
        last, example = self._last
        if last != index:
            try:
                example = self._source[index]
            except Exception as error:  # of all kinds, from damaged records
                reason = f"cannot be read: {str(error) or type(error).__name__}"
                raise UnusableSampleError(f"{self.split}-{index}", "row", reason) from error
            self._last = index, example
        return example

    def _file(self, row: Row, part: str) -> np.ndarray:
        value = _get(self._example(int(getattr(row, part))), self._features[part])
        if isinstance(value, bytes):
            return (decoding.decode_image if part == "image" else decoding.decode_audio)(value, row.id)
        if part == "image":
            decoding.check_image(value, row.id)
            return value
        value = np.asarray(value)
        scale = 1 if value.dtype.kind == "f" else 1 << 15
        if value.ndim != 1 or value.dtype.kind not in "fi" or len(value) > decoding.MAX_SECONDS * self.rate:
            reason = f"is {value.dtype} {list(value.shape)}, expected [N] of at most {decoding.MAX_SECONDS} s"
            raise UnusableSampleError(row.id, part, reason)
        waveform = decoding.resampled((value / scale).astype(np.float32), self.rate)
        decoding.check_audio(waveform, row.id, decoding.SHORTEST)
        return waveform


def _get(tree, name: str):
    """The entry of nested dicts (or features) whose keys, joined by '/', are `name`. Raises KeyError.

    Keys themselves may hold a '/', such as COCO's 'image/id'.
    """
    rest = name
    while hasattr(tree := getattr(tree, "feature", tree), "keys"):  # `feature`: within a Sequence
        if rest in tree.keys():
            return tree[rest]
        key = next((key for key in tree.keys() if rest.startswith(f"{key}/")), None)
        if key is None:
            break
        tree, rest = tree[key], rest[len(key) + 1 :]
    raise KeyError(name)


def _several(value) -> list:
    return [] if value is None else np.ravel(np.asarray(value, object)).tolist()


def _texts(value) -> list[str]:
    """Raises ValueError for bytes that are no UTF-8."""
    return [item.decode() if isinstance(item, bytes) else str(item) for item in _several(value)]


def _holds(value) -> bool:
    """Whether there is a file or an array; TFDS has empty ones for what is absent."""
    return value is not None and len(value) > 0
