"""The raw sample that every source yields, and what a source is."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np


class SourceError(RuntimeError):
    """Raw data is missing or damaged; the message names the file."""


@dataclass(frozen=True)
class Regions:
    """What a detector elsewhere found in a picture, best first.

    Attributes:
      features: float32 [R, Dv].
      boxes: float32 [R, 4], x1 y1 x2 y2 in pixels (right and bottom edges exclusive).
      classes: int32 [R], 1-based. scores: float32 [R].
      width, height: of the picture, in pixels.
    """

    features: np.ndarray
    boxes: np.ndarray
    classes: np.ndarray
    scores: np.ndarray
    width: int
    height: int


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
      regions: what stands for the picture where a detector has already looked at it, or None.
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
    regions: Regions | None = None

    @property
    def has_image(self) -> bool:
        """Whether there is a picture, or what a detector saw in it."""
        return self.image is not None or self.regions is not None


class UnusableSampleError(ValueError):
    """A sample that nothing can be made of; the message names it, its part and why.

    Attributes: sample_id, part ('image', 'audio', 'caption', 'id', 'row'), reason.
    """

    def __init__(self, sample_id: str, part: str, reason: str):
        reason = reason if len(reason) <= 500 else f"{reason[:500]}..."  # some libraries quote whole files
        super().__init__(f"sample {sample_id!r}: {part} {reason}")
        self.sample_id, self.part, self.reason = sample_id, part, reason

    def __reduce__(self):  # pickling would call it with the message alone
        return type(self), (self.sample_id, self.part, self.reason)


@runtime_checkable
class Source(Protocol):
    """A split of triplets with deterministic random access; instances can be pickled.

    modalities: of 'text', 'image' (pixels), 'regions' (ready ones) and 'audio' those that some sample has.
    """

    class_names: Sequence[str]
    modalities: Collection[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Triplet:
        """Sample `index`. Raises UnusableSampleError where it cannot be used: that costs this sample only."""

    def read(self, index: int, image: bool = True, audio: bool = True) -> Triplet:
        """Sample `index`; picture and sound are decoded only where asked for (None otherwise)."""

    def caption(self, index: int) -> str | None:
        """The caption of sample `index`, without decoding its picture or sound; None for an unusable row."""

    def rows_with(self, *parts: str) -> np.ndarray:
        """Rows, int [n] in order, that have all of these parts ('text', 'image', 'regions', 'audio'), as far
        as the list tells: their files may turn out to be unusable."""

    def origin(self, index: int) -> str:
        """Name of the source that sample `index` comes from, for the records of what was set aside."""

    def fingerprint(self) -> dict[str, Any]:
        """JSON-able identity of the data: equal fingerprints mean equal samples."""


def usable(source: Source, index: int, **parts: bool) -> Triplet | None:
    """`source.read`, or None for a sample that cannot be used: building the cache tells of those."""
    try:
        return source.read(index, **parts)
    except UnusableSampleError:
        return None
