"""A source whose speech is mixed with noise."""

import dataclasses
from typing import Any

import numpy as np

from opt_jax.data.mixture import Part
from opt_jax.data.triplet import Source, Triplet

PEAK = 0.99


class Noisy(Part):
    """A source with white noise on its recordings, drawn for each row from (seed, row) alone.

    decibels: power of the speech over that of the noise, each over the whole recording; 0 is as loud.
    """

    def __init__(self, source: Source, decibels: float, seed: int):
        super().__init__(source, np.arange(len(source)), "noisy speech")
        self.decibels, self.seed = decibels, seed

    def read(self, index: int, image: bool = True, audio: bool = True) -> Triplet:
        """See `Source.read`."""
        triplet = super().read(index, image=image, audio=audio)
        if triplet.audio is None:
            return triplet
        rng = np.random.default_rng([self.seed, index])
        return dataclasses.replace(triplet, audio=mixed(triplet.audio, self.decibels, rng))

    def fingerprint(self) -> dict[str, Any]:
        """That of the source, with the noise."""
        return {**self.source.fingerprint(), "noise_decibels": self.decibels, "noise_seed": self.seed}


def mixed(audio: np.ndarray, decibels: float, rng: np.random.Generator) -> np.ndarray:
    """Speech float32 [N] with white noise; made softer as a whole where it would pass full scale."""
    noise = rng.standard_normal(len(audio), np.float32)
    level = np.sqrt(np.mean(np.square(audio, dtype=np.float64)) / 10 ** (decibels / 10))
    noisy = audio + np.float32(level) * noise
    return noisy * np.float32(min(1.0, PEAK / max(np.abs(noisy).max(initial=0.0), 1e-9)))
