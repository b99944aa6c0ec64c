"""What the feature cache of some rows will cost, by the encoders' sizes and by rates measured once."""

import dataclasses

from opt_jax.data.validate_tally import Tally

FRAMES = 50  # of wav2vec 2.0, a second
BOX = 36  # bytes: 7 numbers, class and score of a region
ROW = 350  # bytes: names of the features, index, word pieces
CODE = 4  # bytes


@dataclasses.dataclass(frozen=True)
class Encoders:
    """Sizes of what is cached (numbers are float16), and seconds of work on two CPU cores.

    regions: of a picture, `region_size` wide. codes: of a picture. frame_size: width of a frame of speech.
    cut: seconds of a recording that are kept. region_seconds, code_seconds: work for the regions and for the
    codes of a picture. speech_seconds: work for a second of speech.
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

    @property
    def assumption(self) -> str:
        """One sentence."""
        return (
            f"{self.regions} regions x {self.region_size} and {self.codes} codes a picture,"
            f" {FRAMES} frames x {self.frame_size} a second of speech up to {self.cut:g} s;"
            " as much again for each copy (config.data.copies)"
        )


# The small rates are those of the 9,000 rows of Spoken Scenes, 2.6 s each, in 113 s; the published ones of
# `opt_jax.benchmark.encoders` (7.2 s a picture, 600 s of speech in 56 s) and 2.6 s a picture for the dVAE.
# Each copy of the training rows (`data.copies`) costs as much again. The published detector keeps 10 to 100
# regions of a picture; 36 is what the variant `base` takes.
ENCODERS = (
    Encoders("small detector", 10, 128, 64, 128, 5.12, 0.006, 0.0002, 0.0025),
    Encoders("small, grid", 64, 9 * 128, 64, 128, 5.12, 0.0002, 0.0002, 0.0025),
    Encoders("published", 36, 2048, 1024, 768, 30.72, 7.2, 2.6, 56 / 600),
)


def costs(tally: Tally, factor: float = 1.0) -> list[dict]:
    """For each of ENCODERS {"name", "bytes", "seconds", "assumption"}; times `factor`, where the tally is of
    some of the rows. Regions that come with the rows are taken as they are."""
    found = []
    for e in ENCODERS:
        pictures, speech = tally.pixels.total, tally.within[e.cut]
        regions = max(pictures - tally.ready["with pixels"], 0)
        size = tally.usable * ROW + 2 * tally.text + tally.ready["bytes"]
        size += pictures * e.codes * CODE + regions * e.regions * (2 * e.region_size + BOX)
        size += speech * FRAMES * 2 * e.frame_size
        seconds = regions * e.region_seconds + pictures * e.code_seconds + speech * e.speech_seconds
        found.append(
            {
                "name": e.name,
                "bytes": factor * size,
                "seconds": factor * seconds,
                "assumption": e.assumption,
            }
        )
    return found
