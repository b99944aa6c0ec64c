"""Random access to a finished cache."""

import os
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from opt_jax.cache import manifest as manifest_lib
from opt_jax.cache.ids import Ids
from opt_jax.cache.manifest import CacheError, FingerprintMismatch, read_manifest
from opt_jax.cache.schema import deserialize
from opt_jax.cache.shard import READER_OPTIONS
from opt_jax.configuration import differences

MEND = "build the cache again: only what is damaged is made anew"


class FeatureCache:
    """One split of cached features, by row number.

    A row is a position in the cache; where rows were set aside it differs from the row in the source
    (`source_row`). Safe to use from many threads; when pickled (for worker processes) only the directory and
    the small arrays go along.

    Attributes, N rows:
      manifest: `opt_jax.cache.Manifest`; `manifest.digest` names the content in checkpoints.
      schema: `opt_jax.cache.Schema`. class_names: of `labels`.
      ids, N names; source_row, text_lengths, region_counts, frame_counts, caption_keys [N] int32
        (frame_counts are raw frames, before stacking; lengths are 0 where the modality is absent); presence
        [N, 3] bool (text, image, audio).
      region_mean, region_deviation [Dv] and audio_mean, audio_deviation [D] float32, of the stored features.
    """

    def __init__(self, directory: str | os.PathLike, fingerprint: Mapping | None = None):
        """Opens the cache in `directory`; checks the manifest, the small files and the sizes of the shards.

        Raises CacheError, naming the file, when something is missing or damaged, and FingerprintMismatch
        with the differing keys when `fingerprint` is given and is not the one it was built with.
        """
        self.directory = Path(directory)
        self.manifest = read_manifest(directory)
        self.schema, self.class_names = self.manifest.schema, self.manifest.class_names
        if fingerprint is not None and differences(self.manifest.fingerprint, fingerprint):
            raise FingerprintMismatch(directory, self.manifest.fingerprint, fingerprint)
        for name, digest in self.manifest.files.items():
            path = self.directory / name
            if not path.is_file() or manifest_lib.sha256(path) != digest:
                raise CacheError(f"{path} is missing or damaged; delete the cache and build it again")
        for shard in self.manifest.shards:
            path = self.directory / shard.file
            if not path.is_file():
                raise CacheError(f"{path} is missing; {MEND}")
            if (size := path.stat().st_size) != shard.size:
                raise CacheError(f"{path} has {size} bytes, expected {shard.size}; {MEND}")
        rows = manifest_lib.load_arrays(self.directory / manifest_lib.ROWS)
        self.ids, self.source_row, self.presence = Ids(rows), rows["source_row"], rows["present"]
        self.text_lengths, self.region_counts = rows["text_length"], rows["region_count"]
        self.frame_counts, self.caption_keys = rows["frame_count"], rows["caption_key"]
        statistics = manifest_lib.load_arrays(self.directory / manifest_lib.STATISTICS)
        self.region_mean, self.region_deviation = statistics["region_mean"], statistics["region_deviation"]
        self.audio_mean, self.audio_deviation = statistics["audio_mean"], statistics["audio_deviation"]
        self._starts = np.cumsum([0] + [shard.rows for shard in self.manifest.shards])
        self._readers = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.manifest.num_rows

    def __getitem__(self, row: int) -> dict:
        """The example of one row: the features of `opt_jax.cache.schema`; its arrays are read-only.

        Raises IndexError outside of [0, N), CacheError naming file, position and id when the record is
        damaged.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a cache with {len(self)} rows ({self.directory})")
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        position = int(row - self._starts[number])
        try:
            example = deserialize(self._reader(number).read([position])[0], self.schema)
            if example["index"] != self.source_row[row]:
                found, expected = example["index"], self.source_row[row]
                raise ValueError(f"holds row {found} of the source, expected {expected}")
            return example
        except Exception as error:
            file = self.directory / self.manifest.shards[number].file
            raise CacheError(
                f"{file}, record {position} (id {self.ids[row]}): {error!r}; "
                f"see `python -m opt_jax.cache.verify {self.directory}`"
            ) from error

    def _reader(self, number: int) -> ArrayRecordReader:
        if number not in self._readers:
            with self._lock:
                if number not in self._readers:
                    path = self.directory / self.manifest.shards[number].file
                    self._readers[number] = ArrayRecordReader(os.fspath(path), READER_OPTIONS)
        return self._readers[number]

    def __getstate__(self):
        return {**self.__dict__, "_readers": {}, "_lock": None}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._lock = threading.Lock()
