"""What `opt_jax.data.validate` counts. A tally takes the same memory for any number of rows, and tallies of
some rows each add up to that of all of them."""

import bisect
import collections
import dataclasses
import hashlib
import heapq
import re
import zlib
from typing import NamedTuple

from opt_jax.data.decoding import SAMPLE_RATE
from opt_jax.data.triplet import Triplet, UnusableSampleError

# Upper edges of the bars; 5.12 and 30.72 s, 128 words: what the models of configs/pretrain.py take.
WORDS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256, 1024)
SECONDS = (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 5.12, 8, 12, 16, 24, 30.72, 48, 64, 96, 128, 300, 600, 1800)
PIXELS = (16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192, 16384)
CUTS = (5.12, 30.72)  # seconds
TRANSCRIBED = 5.0  # seconds: the longest recordings whose transcripts wav2vec 2.0 of `manifest` learns
KEYS = 100_000  # different things counted; what comes after them is counted together
VOCABULARY = 500_000
SAMPLES = 24
OTHERS = "others"

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_UNSPELLED = re.compile(r"[^\W_a-z]")  # digits, and letters that are none of wav2vec 2.0's
# What differs between two reasons of one kind: names in quotes, numbers, addresses.
_PARTICULAR = re.compile(r"'[^']*'|\"[^\"]*\"|0x[0-9a-f]+|\d[\d.,]*(?:e[+-]?\d+)?")


class Place(NamedTuple):
    """Where a row is: its number in the split, and in the list that the split (or mixture) is a part of."""

    split: str
    origin: str
    row: int
    list_row: int


class Histogram:
    """Counts of values by the upper edges of their bins (the last one has none); sum, least and most."""

    def __init__(self, edges):
        self.edges, self.counts = edges, [0] * (len(edges) + 1)
        self.sum, self.least, self.most = 0.0, float("inf"), float("-inf")

    def add(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.edges, value)] += 1
        self.sum += value
        self.least, self.most = min(self.least, value), max(self.most, value)

    def update(self, other: "Histogram") -> None:
        self.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        self.sum += other.sum
        self.least, self.most = min(self.least, other.least), max(self.most, other.most)

    @property
    def total(self) -> int:
        return sum(self.counts)

    def above(self, edge: float) -> int:
        """How many values are greater than one of the edges."""
        return sum(self.counts[self.edges.index(edge) + 1 :])

    def bars(self) -> list[tuple[str, int]]:
        """(name, count) of the bins, from the first to the last that is not empty."""
        names = [f"up to {edge:,g}" for edge in self.edges] + [f"over {self.edges[-1]:,}"]
        full = [i for i, count in enumerate(self.counts) if count]
        return list(zip(names, self.counts, strict=True))[full[0] : full[-1] + 1] if full else []


class Counts(collections.Counter):
    """Counts of at most KEYS different things, and of all others together."""

    def add(self, key, count: int = 1) -> None:
        self[key if key in self or len(self) < KEYS else OTHERS] += count

    def update(self, other=None) -> None:
        for key, count in (other or {}).items():
            self.add(key, count)


@dataclasses.dataclass
class Tally:
    """Counts of some rows; `add`, `add_problem` and `update` are all that changes it.

    Attributes:
      rows: by (split, origin, usable). parts: usable rows by what they have, such as 'text + image + audio'.
      labels, speakers, sizes: how often; sizes are 'width x height' of pictures.
      kinds: unusable rows by (part, reason without names and numbers).
      words, seconds, pixels: of captions, recordings, longer sides of pictures.
      within: seconds of recordings by where they are cut off (CUTS). text: bytes of captions and references.
      spoken: recordings that wav2vec 2.0, trained here, learns no transcript of ('long'), or only a part of
        ('spelling').
      ready: pictures that come with pixels and regions, and bytes of all such regions in the cache.
      vocabulary: words in small letters. captions: a number for each row, 0 without a caption: equal
        captions (but for case and spaces) have equal numbers.
      samples: (rank, split, row) of at most SAMPLES usable rows, drawn by chance, the same each time.
      problems: of these rows only, {"split", "origin", "row", "list_row", "id", "part", "reason"}.
    """

    rows: Counts = dataclasses.field(default_factory=Counts)
    parts: Counts = dataclasses.field(default_factory=Counts)
    labels: Counts = dataclasses.field(default_factory=Counts)
    speakers: Counts = dataclasses.field(default_factory=Counts)
    sizes: Counts = dataclasses.field(default_factory=Counts)
    kinds: Counts = dataclasses.field(default_factory=Counts)
    within: Counts = dataclasses.field(default_factory=Counts)
    spoken: Counts = dataclasses.field(default_factory=Counts)
    ready: Counts = dataclasses.field(default_factory=Counts)
    words: Histogram = dataclasses.field(default_factory=lambda: Histogram(WORDS))
    seconds: Histogram = dataclasses.field(default_factory=lambda: Histogram(SECONDS))
    pixels: Histogram = dataclasses.field(default_factory=lambda: Histogram(PIXELS))
    text: int = 0
    vocabulary: set = dataclasses.field(default_factory=set)
    captions: list = dataclasses.field(default_factory=list)
    samples: list = dataclasses.field(default_factory=list)
    problems: list = dataclasses.field(default_factory=list)

    @property
    def usable(self) -> int:
        return sum(count for (_, _, usable), count in self.rows.items() if usable)

    @property
    def unusable(self) -> int:
        return sum(count for (_, _, usable), count in self.rows.items() if not usable)

    def add(self, triplet: Triplet, class_names, place: Place, named=()) -> None:
        """A usable row. `named`: parts it has whose files were not opened."""
        self.rows.add((place.split, place.origin, True))
        has = {"text": triplet.caption, "image": triplet.has_image, "audio": triplet.audio is not None}
        self.parts.add(
            " + ".join(part for part in has if has[part] or part in named) or "nothing that was looked at"
        )
        for label in triplet.labels:
            self.labels.add(class_names[label][:80])
        if triplet.speaker:
            self.speakers.add(triplet.speaker[:80])
        self._add_caption(triplet)
        if triplet.audio is not None:
            seconds = len(triplet.audio) / SAMPLE_RATE
            self.seconds.add(seconds)
            self.spoken.add("long", int(seconds > TRANSCRIBED))
            self.spoken.add("spelling", int(bool(_UNSPELLED.search((triplet.caption or "").lower()))))
            for cut in CUTS:
                self.within.add(cut, min(seconds, cut))
        if triplet.image is not None:
            height, width = triplet.image.shape[:2]
            self.pixels.add(max(height, width))
            self.sizes.add(f"{width} x {height}")
        if triplet.regions is not None:
            self.ready.add("with pixels", triplet.image is not None)
            count, width = triplet.regions.features.shape
            self.ready.add("bytes", count * (2 * width + 36))  # 7 numbers of a box, class and score
        rank = zlib.crc32(f"{place.split}/{place.row}".encode())
        if len(self.samples) < SAMPLES or rank < self.samples[-1][0]:
            self.samples = heapq.nsmallest(SAMPLES, [*self.samples, (rank, place.split, place.row)])

    def _add_caption(self, triplet: Triplet) -> None:
        self.text += sum(len(text.encode(errors="replace")) for text in triplet.references)
        if not triplet.caption:
            self.captions.append(0)
            return
        text = " ".join(triplet.caption.lower().split())
        words = _WORD.findall(text)
        self.words.add(len(words))
        if len(self.vocabulary) < VOCABULARY:
            self.vocabulary.update(word[:64] for word in words)
        digest = hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest()
        self.captions.append(int.from_bytes(digest, "little"))

    def add_problem(self, error: UnusableSampleError, place: Place) -> None:
        """An unusable row."""
        self.rows.add((place.split, place.origin, False))
        # Reasons quote what they found, which may be a row of megabytes.
        reason = error.reason if len(error.reason) <= 500 else error.reason[:500] + "…"
        self.kinds.add((error.part, _PARTICULAR.sub("…", reason)[:160]))
        where = place._asdict() | {"id": error.sample_id[:512]}
        self.problems.append(where | {"part": error.part, "reason": reason})
        self.captions.append(0)

    def update(self, other: "Tally") -> None:
        """Adds the counts of other rows. Their captions and problems are left to the caller."""
        for field in dataclasses.fields(self):
            mine = getattr(self, field.name)
            if isinstance(mine, Counts | Histogram):
                mine.update(getattr(other, field.name))
        self.text += other.text
        if len(self.vocabulary) < VOCABULARY:
            self.vocabulary |= other.vocabulary
        self.samples = heapq.nsmallest(SAMPLES, [*self.samples, *other.samples])
