"""Parts of a source, and several sources as one."""

import bisect
import dataclasses
import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from opt_jax.data.triplet import Source, SourceError, Triplet, UnusableSampleError


class Part:
    """Some rows of a source: rows int [n], in order. `name` says which, for the fingerprint."""

    def __init__(self, source: Source, rows: np.ndarray, name: str):
        self.source, self.rows, self.name = source, np.asarray(rows, np.int64), name
        self.class_names, self.modalities = source.class_names, source.modalities

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Triplet:
        return self.read(index)

    def read(self, index: int, image: bool = True, audio: bool = True) -> Triplet:
        """See `Source.read`."""
        return self.source.read(self._row(index), image=image, audio=audio)

    def caption(self, index: int) -> str | None:
        """See `Source.caption`."""
        return self.source.caption(self._row(index))

    def rows_with(self, *parts: str) -> np.ndarray:
        """See `Source.rows_with`."""
        return np.flatnonzero(np.isin(self.rows, self.source.rows_with(*parts)))

    def origin(self, index: int) -> str:
        """See `Source.origin`."""
        return self.source.origin(self._row(index))

    def _row(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {self.name}: there are {len(self)}")
        return int(self.rows[index])

    def fingerprint(self) -> dict[str, Any]:
        """That of the source, and which rows."""
        rows = hashlib.sha256(self.rows.astype("<i8").tobytes()).hexdigest()
        return {**self.source.fingerprint(), "part": self.name, "rows_sha256": rows, "count": len(self)}


class Mixture:
    """Several sources after one another. Classes are united; an id begins with the number of its source.

    Args:
      sources: at least one. weights: visits of a row in an epoch of training, on average, for each source.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float]):
        if not sources or len(sources) != len(weights):
            raise SourceError(f"a mixture needs one weight a source, found {len(sources)} and {len(weights)}")
        self.sources, self.source_weights = list(sources), [float(weight) for weight in weights]
        self.class_names = sorted({name for source in sources for name in source.class_names})
        self.modalities = {name for source in sources for name in source.modalities}
        numbers = {name: number for number, name in enumerate(self.class_names)}
        self._labels = [[numbers[name] for name in source.class_names] for source in sources]
        self._starts = [0, *itertools.accumulate(map(len, sources))]

    def __len__(self) -> int:
        return self._starts[-1]

    def _place(self, index: int) -> tuple[int, int]:
        """Number of the source, and row in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a mixture: there are {len(self)}")
        number = bisect.bisect_right(self._starts, index) - 1
        return number, index - self._starts[number]

    def __getitem__(self, index: int) -> Triplet:
        return self.read(index)

    def read(self, index: int, image: bool = True, audio: bool = True) -> Triplet:
        """See `Source.read`."""
        number, row = self._place(index)
        try:
            triplet = self.sources[number].read(row, image=image, audio=audio)
        except UnusableSampleError as error:
            raise UnusableSampleError(f"{number}:{error.sample_id}", error.part, error.reason) from error
        labels = tuple(sorted(self._labels[number][label] for label in triplet.labels))
        return dataclasses.replace(triplet, id=f"{number}:{triplet.id}", labels=labels)

    def caption(self, index: int) -> str | None:
        """See `Source.caption`."""
        number, row = self._place(index)
        return self.sources[number].caption(row)

    def rows_with(self, *parts: str) -> np.ndarray:
        """See `Source.rows_with`."""
        pairs = zip(self.sources, self._starts[:-1], strict=True)
        return np.concatenate([start + source.rows_with(*parts) for source, start in pairs])

    def origin(self, index: int) -> str:
        """Number and name of the source."""
        number, row = self._place(index)
        return f"{number}:{self.sources[number].origin(row)}"

    def fingerprint(self) -> dict[str, Any]:
        """Those of all sources. The weights are not in it: they decide no row's content."""
        parts = [source.fingerprint() for source in self.sources]
        return {"source": "mixture", "count": len(self), "sources": parts}


def row_weights(source: Source) -> np.ndarray | None:
    """Visits of each row in an epoch of training, on average, float32 [N]; None where each has one."""
    if not isinstance(source, Mixture) or set(source.source_weights) == {1.0}:
        return None
    return np.repeat(np.array(source.source_weights, np.float32), [len(part) for part in source.sources])
