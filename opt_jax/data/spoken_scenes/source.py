"""Reads generated Spoken Scenes."""

import bisect
import hashlib
import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from opt_jax.data.spoken_scenes.record import decode
from opt_jax.data.triplet import SourceError, Triplet


class SpokenScenes:
    """A split of Spoken Scenes with random access; can be pickled and shared by worker processes.

    Args:
      directory: what `generate` filled.
      split: 'train', 'validation' or 'test'.

    Raises:
      SourceError: the split is not there, not finished, or its manifest is damaged.
    """

    modalities = ("text", "image", "audio")

    def __init__(self, directory, split: str):
        self._folder = Path(directory) / split
        path = self._folder / "manifest.json"
        try:
            content = path.read_bytes()
            manifest = json.loads(content)
        except (FileNotFoundError, ValueError) as error:
            raise SourceError(
                f"{path} is missing or damaged ({error}); delete {directory} and generate Spoken Scenes again"
            ) from error
        self.split = split
        self.class_names: list[str] = manifest["class_names"]
        self._digest = hashlib.sha256(content).hexdigest()
        self._files = [shard["file"] for shard in manifest["shards"]]
        self._starts = [0, *itertools.accumulate(shard["count"] for shard in manifest["shards"])]
        self._rows: list[dict] | None = None
        self._readers: dict[tuple[int, int], ArrayRecordReader] = {}

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Triplet:
        return self.read(index)

    def read(self, index: int, image: bool = True, audio: bool = True) -> Triplet:
        """Sample `index`; picture and sound are decoded only where asked for (None otherwise).

        Raises:
          IndexError: `index` is outside [0, len).
          SourceError: the shard is missing or damaged.
        """
        self._check(index)
        shard = bisect.bisect_right(self._starts, index) - 1
        try:
            (record,) = self._reader(shard).read([index - self._starts[shard]])
        except (RuntimeError, ValueError) as error:  # what ArrayRecord raises for files that it cannot read
            path = self._folder / self._files[shard]
            raise SourceError(
                f"{path}: sample {index} cannot be read ({error}); delete {self._folder.parent},"
                " and it is made again"
            ) from error
        return decode(record, image=image, audio=audio)

    def caption(self, index: int) -> str:
        """The caption of sample `index`, from the captions index."""
        return self.row(index)["caption"]

    def row(self, index: int) -> dict[str, Any]:
        """The readable row of sample `index`: caption, references, objects, boxes, speaker, seconds."""
        self._check(index)
        if self._rows is None:
            with open(self._folder / "captions.jsonl") as lines:
                self._rows = [json.loads(line) for line in lines]
        return self._rows[index]

    def rows_with(self, *parts: str) -> np.ndarray:
        """All rows, but none has ready regions."""
        return np.arange(0 if "regions" in parts else len(self))

    def origin(self, index: int) -> str:
        """All samples come from the generator."""
        return "spoken_scenes"

    def fingerprint(self) -> dict[str, Any]:
        """Name, split, count and the hash of the manifest, which itself holds the hashes of all shards."""
        identity = {"source": "spoken_scenes", "split": self.split, "count": len(self)}
        return {**identity, "manifest_sha256": self._digest}

    def __getstate__(self):
        return {**self.__dict__, "_readers": {}, "_rows": None}

    def _check(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {self._folder}: there are {len(self)}")

    def _reader(self, shard: int) -> ArrayRecordReader:
        key = (os.getpid(), shard)  # a forked process must not share its parent's reader
        if key not in self._readers:
            path = str(self._folder / self._files[shard])
            self._readers[key] = ArrayRecordReader(path, "readahead_buffer_size:0,max_parallelism:0")
        return self._readers[key]
