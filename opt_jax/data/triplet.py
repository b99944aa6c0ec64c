"""The raw sample that every source yields, and what a source is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np


class SourceError(RuntimeError):
    """Raw data is missing or damaged; the message names the file."""


@dataclass(frozen=True)
class Triplet:
    """One sample: a picture, a sentence about it and the sentence spoken; any of the three may be absent.

    Attributes:
      id: name of the sample, unique in its split.
      image: uint8 [height, width, 3], RGB, or None.
      caption: the sentence, the one that is spoken, or None.
      audio: float32 [N], 16 kHz mono in [-1, 1], or None.
      references: all reference captions; the first is `caption`.
      labels: classes of the picture for multi-label classification, 0-based, sorted.
      boxes: float32 [n, 4], x1 y1 x2 y2 in pixels (right and bottom edges exclusive), or None.
      classes: int32 [n], detector class of each box, 1-based (0 is the background), or None.
      named: indices into `boxes` of the objects that the caption names.
      speaker: name of the voice, or None.
    """

    id: str
    image: np.ndarray | None = None
    caption: str | None = None
    audio: np.ndarray | None = None
    references: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()
    boxes: np.ndarray | None = None
    classes: np.ndarray | None = None
    named: tuple[int, ...] = ()
    speaker: str | None = None


@runtime_checkable
class Source(Protocol):
    """A split of triplets with deterministic random access; instances can be pickled."""

    class_names: Sequence[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Triplet: ...

    def caption(self, index: int) -> str | None:
        """The caption of sample `index`, without decoding its picture or sound."""

    def fingerprint(self) -> dict[str, Any]:
        """JSON-able identity of the data: equal fingerprints mean equal samples."""
