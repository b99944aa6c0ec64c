"""What the feature cache of some rows will cost, by the encoders' sizes and by rates measured once."""

import dataclasses

from opt_jax.data.validate_tally import OTHERS, Tally
from opt_jax.encoders.dvae_pictures import placed

FRAMES = 50  # of wav2vec 2.0, a second
BOX = 36  # bytes: 7 numbers, class and score of a region
ROW = 350  # bytes: names of the features, index, word pieces
CODE = 4  # bytes
SQUARE, CELL = 64, 8  # pixels of the small dVAE's picture, and of a cell of its last map


@dataclasses.dataclass(frozen=True)
class Encoders:
    """Sizes of what is cached (numbers are float16), and seconds of work on two CPU cores.

    regions: of a picture, `region_size` wide; by_shape: of a square one, others have fewer. codes: of a
    picture. frame_size: width of a frame of speech. cut: seconds of a recording that are kept.
    region_seconds, code_seconds: work for the regions and for the codes of a picture. speech_seconds: work
    for a second of speech. copies: changed copies of each training row with a caption.
    """

    name: str
    regions: int
    region_size: int
    codes: int
    frame_size: int
    cut: float
    region_seconds: float
    code_seconds: float
    speech_seconds: float
    by_shape: bool = False
    copies: int = 0

    @property
    def assumption(self) -> str:
        """One sentence."""
        regions = f"{self.regions} regions x {self.region_size}"
        if self.by_shape:
            regions = f"up to {regions} by the picture's shape"
        copies = "as much again for each copy (config.data.copies)"
        if self.copies:
            copies = f"with {self.copies} copies of training rows with captions (config.data.copies)"
        return (
            f"{regions} and {self.codes} codes a picture,"
            f" {FRAMES} frames x {self.frame_size} a second of speech up to {self.cut:g} s; {copies}"
        )


# The small rates are those of the 9,000 rows of Spoken Scenes, 2.6 s each, in 113 s; with the grid, those of
# 6,300 rows of spoken digits, 1.6 s each, in 118 s, most of them copies, which have to be made. The published
# ones are of `opt_jax.benchmark.encoders` (7.2 s a picture, 600 s of speech in 56 s) and 2.6 s a picture for
# the dVAE. The copies are those of the variant `manifest` of configs/pretrain.py, which takes the grid. The
# published detector keeps 10 to 100 regions of a picture; 36 is what the variant `base` takes.
ENCODERS = (
    Encoders("small detector", 10, 128, 64, 128, 5.12, 0.006, 0.0002, 0.0025),
    Encoders("small, grid", 64, 9 * 128, 64, 128, 5.12, 0.0145, 0.0002, 0.0025, by_shape=True, copies=3),
    Encoders("published", 36, 2048, 1024, 768, 30.72, 7.2, 2.6, 56 / 600),
)


def costs(tally: Tally, factor: float = 1.0, copied: float = 0.0) -> list[dict]:
    """For each of ENCODERS {"name", "bytes", "seconds", "assumption"}; times `factor`, where the tally is of
    some of the rows. Regions that come with the rows are taken as they are. copied: share of the rows that
    are of training and have a caption; they are taken to be as large as the others."""
    found, shown = [], grid_share(tally)
    for e in ENCODERS:
        pictures, speech = tally.pixels.total, tally.within[e.cut]
        regions = max(pictures - tally.ready["with pixels"], 0)
        kept = e.regions * (shown if e.by_shape else 1.0)
        size = tally.usable * ROW + 2 * tally.text + tally.ready["bytes"]
        size += pictures * e.codes * CODE + regions * kept * (2 * e.region_size + BOX)
        size += speech * FRAMES * 2 * e.frame_size
        seconds = regions * e.region_seconds + pictures * e.code_seconds + speech * e.speech_seconds
        times = factor * (1 + e.copies * copied)
        found.append(
            {
                "name": e.name,
                "bytes": times * size,
                "seconds": times * seconds,
                "assumption": e.assumption,
            }
        )
    return found


def grid_share(tally: Tally) -> float:
    """Share of the grid's cells that show something of the picture, on average; see `encoders.grid`."""
    sizes = {tuple(map(int, s.split(" x "))): count for s, count in tally.sizes.items() if s != OTHERS}
    if not sizes:
        return 1.0
    cells = sum(count * _cells(*size) for size, count in sizes.items())
    return cells / sum(sizes.values()) / (SQUARE // CELL) ** 2


def _cells(width: int, height: int) -> int:
    top, left, height, width = placed((height, width), SQUARE)
    spans = ((top, top + height), (left, left + width))
    rows, columns = (-(-stop // CELL) - start // CELL for start, stop in spans)
    return rows * columns
