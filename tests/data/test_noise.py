"""Speech mixed with noise: how loud, the same every time, and nothing else changed."""

import dataclasses

import numpy as np
import pytest

from opt_jax.data.noise import Noisy, mixed
from opt_jax.data.triplet import Triplet


class Recordings:
    class_names, modalities = ("a",), ("text", "audio")

    def __init__(self):
        rng = np.random.default_rng(0)
        spoken = (0.1 * rng.standard_normal(16000)).astype(np.float32)
        silent, loud = np.zeros(100, np.float32), np.full(1000, 0.9, np.float32)
        self.rows = [
            Triplet(str(i), caption="a", audio=audio) for i, audio in enumerate((spoken, silent, loud, None))
        ]

    def __len__(self):
        return len(self.rows)

    def read(self, index, image=True, audio=True):
        return self.rows[index] if audio else dataclasses.replace(self.rows[index], audio=None)

    def fingerprint(self):
        return {"source": "recordings"}


@pytest.mark.parametrize("decibels", [-5.0, 0.0, 10.0])
def test_noise_is_as_loud_as_asked_for(decibels):
    speech = Recordings().rows[0].audio
    noise = mixed(speech, decibels, np.random.default_rng(1)).astype(np.float64) - speech
    ratio = 10 * np.log10(np.mean(speech.astype(np.float64) ** 2) / np.mean(noise**2))
    assert abs(ratio - decibels) < 0.2  # 16,000 samples
    assert abs(np.corrcoef(noise, speech)[0, 1]) < 0.05


def test_every_row_has_noise_of_its_own_and_always_the_same():
    source = Noisy(Recordings(), 0.0, seed=3)
    assert len(source) == 4
    np.testing.assert_array_equal(source[0].audio, source.read(0, image=False).audio)
    assert (source[0].audio != Noisy(Recordings(), 0.0, seed=4)[0].audio).any()
    assert source[0].audio.dtype == np.float32 and np.isfinite(source[1].audio).all()
    assert np.abs(source[2].audio).max() <= 0.991  # softer as a whole, not clipped
    assert source[3].audio is None and source.read(0, audio=False).audio is None
    assert source[0].caption == "a"


def test_the_fingerprint_tells_the_noise():
    prints = [Noisy(Recordings(), d, s).fingerprint() for d, s in ((0.0, 1), (0.0, 2), (3.0, 1))]
    assert len({str(p) for p in prints}) == 3
