"""Batches on the wire: reads the rows a plan names, pads them, and does so ahead of time with Grain.

Shapes of a batch, B rows (of this host), T word pieces, V regions, A audio positions, K image codes, C
classes:

| key             | shape        | dtype          | |
|-----------------|--------------|----------------|---|
| text_ids        | [B, T]       | int32          | [CLS] pieces [SEP]; [CLS] alone where text is absent |
| text_valid      | [B, T]       | bool           | [CLS] is valid in every row |
| region_features | [B, V, Dv]   | feature dtype  | |
| region_boxes    | [B, V, 7]    | float32        | relative to the image size |
| region_classes  | [B, V]       | int32          | 1-based |
| region_valid    | [B, V]       | bool           | |
| audio_features  | [B, A, Da]   | feature dtype  | Da = stack * D, frames in order |
| audio_valid     | [B, A]       | bool           | |
| image_codes     | [B, K]       | int32          | -1 where regions came ready, without pixels |
| present         | [B, 3]       | bool           | text, image, audio |
| caption_key     | [B]          | int32          | equal for equal captions |
| labels          | [B, C]       | float32        | multi-hot |
| index           | [B]          | int32          | row in the cache, -1 in a filler row |
| row_valid       | [B]          | bool           | False in the filler rows of the last evaluation batch |

Padding is zero. A text that is cut keeps its [SEP]. Features are as stored: not standardised.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence

import grain.python as grain
import numpy as np

from opt_jax.cache.reader import FeatureCache
from opt_jax.data import plan as plan_lib
from opt_jax.data.plan import Batch

ENDLESS = 1 << 40
"""Number of steps a training iterator offers."""


@dataclasses.dataclass(frozen=True)
class LoaderConfig:
    """How rows become batches.

    batch_size: rows of the global batch.
    buckets: (T, A) pairs, growing; the last is the longest a row may be.
    audio_stack: raw frames in one audio position.
    max_regions: V; of more regions the first, best scored, are taken.
    seed: of the order.
    threads: reading ahead, in this process; 0 reads when asked.
    prefetch: batches ready ahead.
    workers: processes that read; 0 for none, which suffices unless examples are large.
    """

    batch_size: int
    buckets: tuple[tuple[int, int], ...]
    audio_stack: int
    max_regions: int
    seed: int = 0
    threads: int = 2
    prefetch: int = 8
    workers: int = 0


class Loader:
    """Batches of a cache. The data position is the global step: nothing else has to be saved to resume.

    Attributes: `steps_per_epoch`; `audio_lengths` [N], stacked positions of every row.
    """

    def __init__(
        self,
        cache: FeatureCache,
        config: LoaderConfig,
        *,
        rows: np.ndarray | None = None,
        weights: np.ndarray | None = None,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """`rows` restricts training to some rows of the cache (int [n]); None is all of them. `weights`:
        visits of each row of the cache in an epoch, on average (float [N], above 0); None is one each.

        Raises ValueError for other weights.
        """
        self.cache = cache
        self.config = config
        self.rows = np.arange(len(cache)) if rows is None else np.asarray(rows)
        self.weights = None
        if weights is not None:
            weights = np.asarray(weights)
            if weights.shape != (len(cache),) or not (np.isfinite(weights) & (weights > 0)).all():
                raise ValueError(f"weights {weights.shape} have to be {len(cache)} finite numbers above 0")
            self.weights = weights[self.rows]
        self.process_index, self.process_count = process_index, process_count
        self.audio_lengths = plan_lib.stacked_length(cache.frame_counts, config.audio_stack)
        plan_lib.host_slice(np.arange(config.batch_size), process_index, process_count)

    @functools.cached_property
    def steps_per_epoch(self) -> int:
        """Raises ValueError where the rows do not fill one batch, which only training needs."""
        return plan_lib.steps_per_epoch(len(self.rows), self.config.batch_size, self.weights)

    def epoch(self, number: int) -> list[Batch]:
        """The global batches of epoch `number`, in order; their indices are rows of the cache."""
        rows = self.rows
        batches = plan_lib.plan_epoch(
            self.config.seed,
            number,
            self.cache.text_lengths[rows],
            self.audio_lengths[rows],
            self.cache.presence[rows],
            self.config.batch_size,
            self.config.buckets,
            self.weights,
        )
        return [dataclasses.replace(batch, indices=rows[batch.indices]) for batch in batches]

    def report(self) -> dict[str, float]:
        """Padding and truncation in the first epoch: `opt_jax.data.plan.report`, and `truncated_regions`, the
        rows with too many regions."""
        batches = self.epoch(0)
        figures = plan_lib.report(batches, self.cache.text_lengths, self.audio_lengths, self.cache.presence)
        used = np.concatenate([batch.indices for batch in batches])
        figures["left_out"] = len(self.rows) - len(np.unique(used))
        figures["truncated_regions"] = int((self.cache.region_counts[used] > self.config.max_regions).sum())
        return figures

    def from_step(self, step: int) -> Iterator[dict[str, np.ndarray]]:
        """This host's part of the global batches `step`, `step + 1`, ... without end."""
        dataset = grain.MapDataset.source(_Steps(self, step)).map(self._collate)
        return iter(self._read_ahead(dataset))

    def evaluation_batches(
        self, indices: Sequence[int], batch_size: int, lengths: tuple[int, int]
    ) -> Iterator[dict[str, np.ndarray]]:
        """Rows `indices` in order, in batches of shape (T, A) = `lengths`; filler rows end the last."""
        indices = np.asarray(indices, np.int64)
        filled = np.full(-(-len(indices) // batch_size) * batch_size, -1)
        filled[: len(indices)] = indices
        batches = [self._own(Batch(part, *lengths)) for part in filled.reshape(-1, batch_size)]
        return iter(self._read_ahead(grain.MapDataset.source(batches).map(self._collate)))

    def _own(self, batch: Batch) -> Batch:
        indices = plan_lib.host_slice(batch.indices, self.process_index, self.process_count)
        return dataclasses.replace(batch, indices=indices)

    def _collate(self, batch: Batch) -> dict[str, np.ndarray]:
        return collate(self.cache, batch, self.config.audio_stack, self.config.max_regions)

    def _read_ahead(self, dataset: grain.MapDataset) -> grain.IterDataset:
        options = grain.ReadOptions(self.config.threads, self.config.prefetch if self.config.threads else 0)
        dataset = dataset.to_iter_dataset(options)
        if self.config.workers:
            dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=self.config.workers))
        return dataset


class _Steps:
    """Grain source: position i is what this host loads at global step `start + i`."""

    def __init__(self, loader: Loader, start: int):
        self._loader, self._start = loader, start
        self._epoch = functools.lru_cache(maxsize=2)(loader.epoch)

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, position: int) -> Batch:
        epoch, offset = divmod(self._start + position, self._loader.steps_per_epoch)
        return self._loader._own(self._epoch(epoch)[offset])

    def __getstate__(self):
        return self._loader, self._start

    def __setstate__(self, state):
        self.__init__(*state)


def collate(cache: FeatureCache, batch: Batch, audio_stack: int, max_regions: int) -> dict[str, np.ndarray]:
    """Reads the rows of `batch` and pads them; -1 asks for a filler row. See the table above.

    Raises CacheError, naming file and id, when a row cannot be read or lacks a feature.
    """
    arrays = _empty(cache, batch, audio_stack, max_regions)
    for position, row in enumerate(batch.indices):
        if row >= 0:
            _fill(arrays, position, cache[int(row)], audio_stack)
            arrays["caption_key"][position] = cache.caption_keys[row]
    return arrays


def _empty(cache: FeatureCache, batch: Batch, stack: int, max_regions: int) -> dict[str, np.ndarray]:
    schema = cache.schema
    rows, text, audio = len(batch.indices), batch.text_length, batch.audio_length
    shapes = {
        "text_ids": ((rows, text), np.int32),
        "text_valid": ((rows, text), np.bool_),
        "region_features": ((rows, max_regions, schema.region_size), schema.dtype),
        "region_boxes": ((rows, max_regions, 7), np.float32),
        "region_classes": ((rows, max_regions), np.int32),
        "region_valid": ((rows, max_regions), np.bool_),
        "audio_features": ((rows, audio, stack * schema.audio_size), schema.dtype),
        "audio_valid": ((rows, audio), np.bool_),
        "image_codes": ((rows, schema.num_codes), np.int32),
        "present": ((rows, 3), np.bool_),
        "caption_key": ((rows,), np.int32),
        "labels": ((rows, len(cache.class_names)), np.float32),
    }
    arrays = {name: np.zeros(shape, dtype) for name, (shape, dtype) in shapes.items()}
    arrays["text_ids"][:, 0] = schema.cls_id
    arrays["text_valid"][:, 0] = True
    arrays["index"] = batch.indices.astype(np.int32)
    arrays["row_valid"] = batch.indices >= 0
    return arrays


def _fill(arrays: dict[str, np.ndarray], position: int, example: Mapping, stack: int) -> None:
    """Writes one example into row `position` of the arrays."""
    text = example["text_ids"]
    if len(text):
        limit = arrays["text_ids"].shape[1]
        length = min(len(text), limit)
        arrays["text_ids"][position, :length] = text[:length]
        arrays["text_ids"][position, length - 1] = text[-1]
        arrays["text_valid"][position, :length] = True
    regions = min(len(example["region_features"]), arrays["region_valid"].shape[1])
    for name in ("region_features", "region_boxes", "region_classes"):
        arrays[name][position, :regions] = example[name][:regions]
    arrays["region_valid"][position, :regions] = True
    if len(example["audio_features"]):
        frames = stack_frames(example["audio_features"], stack)[: arrays["audio_valid"].shape[1]]
        arrays["audio_features"][position, : len(frames)] = frames
        arrays["audio_valid"][position, : len(frames)] = True
    if len(example["image_codes"]):
        arrays["image_codes"][position] = example["image_codes"]
    elif example["present"][1]:
        arrays["image_codes"][position] = -1
    arrays["present"][position] = example["present"]
    arrays["labels"][position, example["labels"]] = 1


def stack_frames(frames: np.ndarray, stack: int) -> np.ndarray:
    """[F, D] -> [ceil(F / stack), stack * D]: `stack` frames in a row make one position.

    The last position is filled up by repeating the last frame: zeros there would be a jump once standardised.
    """
    missing = -len(frames) % stack
    if missing:
        frames = np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)])
    return frames.reshape(-1, stack * frames.shape[1])
