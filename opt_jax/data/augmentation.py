"""Copies of training rows whose pictures are moved a little and whose speech is faster, slower or noisier.

Features are cached, so what would elsewhere be drawn anew in every epoch is drawn a few times, once.
"""

import dataclasses
from fractions import Fraction
from typing import Any

import numpy as np
from PIL import Image
from scipy.signal import resample_poly

from opt_jax.data.mixture import Part
from opt_jax.data.noise import mixed
from opt_jax.data.triplet import Source, Triplet

AUGMENTATION_VERSION = 2  # to be raised with every change of what is drawn
SCALE, DEGREES, SHIFT = (0.88, 1.12), 6.0, (0.04, 0.08)  # the shift in widths and in heights
SPEEDS = (0.9, 0.95, 1.05, 1.1)
MAX_PIXELS = 1 << 26  # with its margins: 0.2 GB
DECIBELS = (10.0, 30.0)  # of speech over noise


def with_copies(source: Source, copies: int, seed: int) -> Source:
    """The source with changed copies of its rows, or itself where there would be nothing to change."""
    if not copies or not {"image", "audio"} & set(source.modalities):
        return source
    return Augmented(source, copies, seed)


class Augmented(Part):
    """A source with `copies` changed copies of each row that has a caption, after its own rows.

    What is drawn for a row depends on (seed, row) alone. Captions and labels stay. Boxes are left out, and
    regions that came ready, without pixels, stay as they are. Equal captions tell the training that a picture
    and the recording of another copy belong together; without one they would count as strangers, so those
    rows have no copies.
    """

    def __init__(self, source: Source, copies: int, seed: int):
        captioned = np.asarray(source.rows_with("text"), np.int64)
        rows = np.concatenate([np.arange(len(source)), *[captioned] * copies])
        super().__init__(source, rows, "rows and their copies")
        self.copies, self.seed = copies, seed

    def read(self, index: int, image: bool = True, audio: bool = True) -> Triplet:
        """See `Source.read`."""
        triplet = super().read(index, image=image, audio=audio)
        own = len(self.source)
        if index < own:
            return triplet
        copy = 1 + (index - own) * self.copies // (len(self) - own)
        rng = np.random.default_rng([self.seed, index])
        drawn = rng.random(4)  # before anything else, so that the picture's do not depend on the sound
        changed = {"id": f"{triplet.id}~{copy}", "boxes": None, "classes": None, "named": ()}
        if triplet.image is not None and triplet.regions is None:
            changed["image"] = moved(triplet.image, *drawn)
        if triplet.audio is not None:
            changed["audio"] = respoken(triplet.audio, rng)
        return dataclasses.replace(triplet, **changed)

    def fingerprint(self) -> dict[str, Any]:
        """That of the source, and how it is changed."""
        augmentation = {"copies": self.copies, "seed": self.seed, "version": AUGMENTATION_VERSION}
        return {**self.source.fingerprint(), "augmentation": augmentation}


def moved(image: np.ndarray, scale: float, angle: float, x: float, y: float) -> np.ndarray:
    """A picture uint8 [h, w, 3] scaled, turned and shifted; its edges go on beyond it.

    All four are draws in [0, 1), 0.5 changes nothing. A very large picture stays as it is.
    """
    height, width = image.shape[:2]
    factor = SCALE[0] + (SCALE[1] - SCALE[0]) * scale
    turn = np.deg2rad(DEGREES * (2 * angle - 1))
    dx, dy = SHIFT[0] * width * (2 * x - 1), SHIFT[1] * height * (2 * y - 1)
    margin = (max(height, width) + 3) // 4  # more than scale, turn and shift can reach together
    if (height + 2 * margin) * (width + 2 * margin) > MAX_PIXELS:
        return image
    padded = Image.fromarray(np.pad(image, ((margin, margin), (margin, margin), (0, 0)), mode="edge"))
    cos, sin = np.cos(turn) / factor, np.sin(turn) / factor
    centre_x, centre_y = margin + width / 2, margin + height / 2
    # From a pixel of the result to the place in the picture that it shows.
    rows = (
        (cos, sin, centre_x - cos * (width / 2 + dx) - sin * (height / 2 + dy)),
        (-sin, cos, centre_y + sin * (width / 2 + dx) - cos * (height / 2 + dy)),
    )
    affine = (*rows[0], *rows[1])
    result = padded.transform((width, height), Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC)
    return np.asarray(result)


def respoken(audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Speech float32 [N] at another speed, with faint noise."""
    speed = Fraction(SPEEDS[int(rng.integers(len(SPEEDS)))]).limit_denominator(100)
    played = resample_poly(audio, speed.denominator, speed.numerator).astype(np.float32)
    return mixed(played, float(rng.uniform(*DECIBELS)), rng)
