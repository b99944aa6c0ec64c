"""Batches of waveforms of similar length, padded to a few fixed lengths so that few shapes are compiled.

Letters: B batch, N waveform samples, U letters of a transcript.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np
from scipy.signal import resample_poly

from opt_jax.data.triplet import Source, usable
from opt_jax.encoders.wav2vec2 import SAMPLE_RATE
from opt_jax.encoders.wav2vec2_objectives import encode_letters


class NoUsableClipsError(ValueError):
    """No sample of a source has speech, and a transcript where one is needed, of a usable length."""


class WaveformBatches:
    """Batches whose content is a function of (seed, step).

    The samples that have audio and a transcript run through shuffled epochs in pools of `pool_batches`
    batches. A pool is decoded, sorted by length, cut into batches and given out in random order. A clip
    shorter than `shortest` samples or longer than the longest bucket is left out, and clips of the same pool
    are repeated in its place. Without `transcribed` no transcript is needed, and of a longer clip a part is
    taken, drawn anew every time. With `speeds` each clip of a pool is played at one of them, drawn anew too
    (Ko et al., 2015); `once` plays all as they are.

    A batch is {waveforms [B, N] f32 raw, lengths [B] i32, labels [B, U] i32, label_lengths [B] i32}; N is the
    bucket that holds its longest clip, U belongs to the bucket (`letters_per_second` of it) and longer
    transcripts are left out.
    """

    def __init__(
        self,
        source: Source,
        vocabulary: Sequence[str],
        *,
        batch_size: int,
        bucket_seconds: Sequence[float],
        pool_batches: int,
        letters_per_second: float,
        seed: int,
        speeds: Sequence[float] = (1.0,),
        transcribed: bool = True,
        shortest: int = 1600,
    ):
        """Raises NoUsableClipsError where no sample has audio, and a transcript where that is needed."""
        self.source, self.vocabulary, self.seed, self.shortest = source, tuple(vocabulary), seed, shortest
        self.batch_size, self.pool_batches = batch_size, pool_batches
        self.buckets = sorted(round(seconds * SAMPLE_RATE) for seconds in bucket_seconds)
        self.letters_per_second = letters_per_second
        self.transcribed = transcribed
        self.rows = source.rows_with("audio", *(["text"] if transcribed else []))
        if not len(self.rows):
            raise NoUsableClipsError(
                f"none of {len(source)} samples has audio{' and a caption' if transcribed else ''},"
                " which wav2vec 2.0 is trained on"
            )
        self.speeds = [Fraction(speed).limit_denominator(100) for speed in speeds]

    def from_step(self, step: int) -> Iterator[dict[str, np.ndarray]]:
        """Batches without end, the first being that of `step`."""
        while True:
            pool, first = divmod(step, self.pool_batches)
            batches = self._pool(pool)
            yield from batches[first:]
            step += self.pool_batches - first

    def once(self) -> Iterator[tuple[dict[str, np.ndarray], list[int]]]:
        """Every usable clip once, shortest first: (batch, indices of its clips); repeats fill the last."""
        clips = sorted(self._usable(map(int, self.rows)), key=lambda clip: len(clip[1]))
        for start in range(0, len(clips), self.batch_size):
            batch = clips[start : start + self.batch_size]
            padded = batch + [batch[-1]] * (self.batch_size - len(batch))
            yield self._collate(padded), [index for index, _, _ in batch]

    def _pool(self, pool: int) -> list[dict[str, np.ndarray]]:
        size = self.pool_batches * self.batch_size
        rng = np.random.default_rng([self.seed, 1, pool])
        count, start, clips = len(self.rows), pool * size, []
        while not clips:  # where few can be used, a pool may have none, and the next ones stand in for it
            if start >= pool * size + count + size:
                letters = " and a caption of letters of model.vocabulary, few enough for that time"
                raise NoUsableClipsError(
                    f"of {count} samples with audio none has {self.shortest / SAMPLE_RATE:g} to"
                    f" {self.buckets[-1] / SAMPLE_RATE:g} s (batches.bucket_seconds)"
                    + (letters if self.transcribed else "")
                )
            positions = np.arange(start, start + size)
            orders = {
                epoch: np.random.default_rng([self.seed, 0, epoch]).permutation(count)
                for epoch in np.unique(positions // count)
            }
            clips = self._usable((int(self.rows[orders[p // count][p % count]]) for p in positions), rng)
            start += size
        clips = [self._played(*clip, rng) for clip in (clips * (size // len(clips) + 1))[:size]]
        clips = sorted(clips, key=lambda clip: len(clip[1]))
        return [
            self._collate(clips[i * self.batch_size : (i + 1) * self.batch_size])
            for i in rng.permutation(self.pool_batches)
        ]

    def _usable(self, indices, rng=None) -> list[tuple[int, np.ndarray, list[int]]]:
        """(index, audio, letters) of the clips that can be used; `rng` draws parts of longer ones."""
        clips, longest = [], self.buckets[-1]
        for index in indices:
            sample = usable(self.source, index, image=False)
            if sample is None or sample.audio is None or len(sample.audio) < self.shortest:
                continue
            audio = sample.audio
            if not self.transcribed:
                first = rng.integers(len(audio) - longest + 1) if rng and len(audio) > longest else 0
                clips.append((index, audio[first : first + longest], []))
                continue
            if len(audio) > longest or not sample.caption:
                continue
            letters = encode_letters(sample.caption, self.vocabulary)
            if 0 < len(letters) <= self._letters(self._bucket(len(audio))):
                clips.append((index, audio, letters))
        return clips

    def _played(self, index: int, audio: np.ndarray, letters: list[int], rng):
        """The clip at one of `speeds`, or as it is where it would not fit then."""
        speed = self.speeds[rng.integers(len(self.speeds))] if len(self.speeds) > 1 else self.speeds[0]
        length = math.ceil(len(audio) / speed)
        if speed == 1 or not self.shortest <= length <= self.buckets[-1]:
            return index, audio, letters
        if len(letters) > self._letters(self._bucket(length)):
            return index, audio, letters
        return index, resample_poly(audio, speed.denominator, speed.numerator).astype(np.float32), letters

    def _bucket(self, length: int) -> int:
        return next(bucket for bucket in self.buckets if length <= bucket)

    def _letters(self, bucket: int) -> int:
        return int(self.letters_per_second * bucket / SAMPLE_RATE)

    def _collate(self, clips) -> dict[str, np.ndarray]:
        bucket = self._bucket(max(len(audio) for _, audio, _ in clips))
        waveforms = np.zeros((len(clips), bucket), np.float32)
        labels = np.zeros((len(clips), self._letters(bucket)), np.int32)
        for row, (_, audio, letters) in enumerate(clips):
            waveforms[row, : len(audio)] = audio
            labels[row, : len(letters)] = letters
        return {
            "waveforms": waveforms,
            "lengths": np.array([len(audio) for _, audio, _ in clips], np.int32),
            "labels": labels,
            "label_lengths": np.array([len(letters) for _, _, letters in clips], np.int32),
        }
