"""Batches of waveforms: order, speeds, what is left out, rare speech."""

import itertools
import math

import jax
import numpy as np
import pytest

from configs.encoders.wav2vec2 import get_config
from opt_jax.data.triplet import Triplet
from opt_jax.encoders.wav2vec2_batches import NoUsableClipsError, WaveformBatches


def speech(seed: int, samples: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(samples).astype(np.float32)


class Noise:
    """A source of noise with one clip too long, one without words and one without sound."""

    class_names = ()

    def __len__(self):
        return 12

    def rows_with(self, *parts):
        without = {"text": 3, "audio": 5}
        return np.array([row for row in range(12) if row not in [without[part] for part in parts]])

    def caption(self, index):
        return None if index == 3 else "abc"[: 1 + index % 3]

    def read(self, index, image=True, audio=True):
        audio = None if index == 5 else speech(index, 9000 if index == 1 else 2000 + 100 * index)
        return Triplet(id=str(index), caption=self.caption(index), audio=audio)

    def fingerprint(self):
        return {"source": "noise"}


def noise_batches(**changes):
    settings = dict(batch_size=2, bucket_seconds=(0.15, 0.2), pool_batches=3, letters_per_second=40.0, seed=1)
    return WaveformBatches(Noise(), get_config("tiny").model.vocabulary, **(settings | changes))


def test_batches_are_a_function_of_the_step():
    ahead = list(itertools.islice(noise_batches().from_step(0), 7))
    for step in (1, 4, 6):
        again = next(noise_batches().from_step(step))
        jax.tree.map(np.testing.assert_array_equal, again, ahead[step])
    assert {batch["waveforms"].shape for batch in ahead} <= {(2, 2400), (2, 3200)}
    for batch in ahead:
        assert (
            batch["waveforms"].dtype == np.float32 and batch["lengths"].max() <= batch["waveforms"].shape[1]
        )
        assert np.all(batch["label_lengths"] > 0) and not np.any(batch["waveforms"][0, batch["lengths"][0] :])


def test_clips_are_played_at_other_speeds_in_training_only():
    plain = noise_batches(batch_size=12, pool_batches=1)
    changed = noise_batches(batch_size=12, pool_batches=1, speeds=(0.8, 1.0, 1.25, 4.0))
    (batch,), (other,) = plain._pool(0), changed._pool(0)
    lengths, played = sorted(batch["lengths"]), sorted(other["lengths"])
    assert lengths != played and sorted(batch["label_lengths"]) == sorted(other["label_lengths"])
    for length in played:  # at a speed, but never at 4.0: what would be shorter than `shortest` stays
        assert any(length in (n, math.ceil(n / 0.8), math.ceil(n / 1.25)) for n in lengths)
    assert min(played) >= plain.shortest and max(played) <= plain.buckets[-1]
    np.testing.assert_array_equal(other["waveforms"], changed._pool(0)[0]["waveforms"])
    for (batch, _), (other, _) in zip(plain.once(), changed.once(), strict=True):
        np.testing.assert_array_equal(batch["waveforms"], other["waveforms"])


class RarelySpoken(Noise):
    """Of 3,000 samples every 600th has a recording, and of those two are of a usable length."""

    def __len__(self):
        return 3000

    def rows_with(self, *parts):
        return np.arange(0, 3000, 600 if "audio" in parts else 1)

    def read(self, index, image=True, audio=True):
        length = 2500 + index if index in (600, 1800) else 9000
        clip = speech(index, length) if index % 600 == 0 else None
        return Triplet(id=str(index), caption="abc", audio=clip)


def test_rare_speech_is_found_and_long_clips_are_cut_where_no_transcript_is_needed():
    settings = dict(batch_size=1, pool_batches=1, letters_per_second=40.0, seed=1)
    source, vocabulary = RarelySpoken(), get_config("tiny").model.vocabulary
    batches = WaveformBatches(source, vocabulary, bucket_seconds=(0.3,), **settings)
    lengths = [int(batch["lengths"][0]) for batch in itertools.islice(batches.from_step(0), 10)]
    assert set(lengths) == {3100, 4300}  # one row to a pool: three of five have nothing of their own
    cut = WaveformBatches(source, vocabulary, bucket_seconds=(0.3,), transcribed=False, **settings)
    found = list(itertools.islice(cut.from_step(0), 10))
    assert {int(batch["lengths"][0]) for batch in found} == {3100, 4300, 4800}
    starts = {batch["waveforms"][0, :100].tobytes() for batch in found if batch["lengths"][0] == 4800}
    assert len(starts) > 3  # each time another part
    np.testing.assert_array_equal(found[3]["waveforms"], next(cut.from_step(3))["waveforms"])


def test_a_tone_played_faster_is_higher():
    second = np.arange(16_000) / 16_000
    batches = noise_batches(bucket_seconds=(2.0,), speeds=(1.25,))
    _, faster, _ = batches._played(0, np.sin(2 * np.pi * 400 * second).astype(np.float32), [1], None)
    assert len(faster) == 12_800 and np.abs(np.fft.rfft(faster)).argmax() == 400  # cycles in 0.8 s at 500 Hz
    np.testing.assert_allclose(faster[500:-500], np.sin(2 * np.pi * 500 * second[500:12_300]), atol=2e-3)


def test_every_usable_clip_once():
    seen = []
    for batch, indices in noise_batches(batch_size=4).once():
        assert len(batch["lengths"]) == 4
        assert batch["lengths"][: len(indices)].tolist() == [2000 + 100 * i for i in indices]
        seen += indices
    assert sorted(seen) == [0, 2, 4, 6, 7, 8, 9, 10, 11]


def test_no_usable_clip_is_an_error():
    with pytest.raises(NoUsableClipsError, match="bucket_seconds"):
        next(noise_batches(bucket_seconds=(0.1,)).from_step(0))
