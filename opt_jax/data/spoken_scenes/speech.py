"""Speech from espeak-ng, called through ctypes from the library that `espeakng-loader` brings."""

import ctypes
import functools
import math
from pathlib import Path

import numpy as np

SAMPLE_RATE = 16_000
# Accent + speaker. A variant (speaker) of validation or test occurs in no training voice.
TRAIN_VOICES = (
    "en-us+m1", "en-us+m3", "en-us+m7", "en-us+f1", "en-us+f2", "en-us+f5",
    "en-us-nyc+m2", "en-us-nyc+f3", "en-us+Andy", "en-us+belinda",
    "en-gb-x-rp+m1", "en-gb-x-rp+m8", "en-gb-x-rp+f3", "en-gb-x-rp+f1",
    "en-gb-scotland+m5", "en-gb-scotland+f2",
)  # fmt: skip
VALIDATION_VOICES = ("en-us+Annie", "en-gb-x-rp+max")
TEST_VOICES = ("en-us+m4", "en-us+f4", "en-gb-x-rp+m6", "en-gb-scotland+linda")

_SYNCHRONOUS, _UTF8, _POSITION_CHARACTER = 2, 1, 1
_RATE, _VOLUME, _PITCH = 1, 2, 3
_VOLUME_PERCENT = 60  # louder, some voices clip inside espeak
_MARGIN_SECONDS = 0.05
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


def load_espeak():
    """The `espeakng_loader` module.

    Raises:
      ModuleNotFoundError: it is not installed.
    """
    try:
        import espeakng_loader
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Spoken Scenes needs the package espeakng-loader to speak: pip install -e '.[demo]'"
        ) from error
    return espeakng_loader


class Synthesizer:
    """The process's espeak-ng engine.

    What it returns for a sentence depends on all that the process spoke before, so reproducible speech needs
    a fresh process and a fixed order of calls.
    """

    def __init__(self):
        loader = load_espeak()
        self._library = ctypes.CDLL(loader.get_library_path())
        self._variants = Path(loader.get_data_path()) / "voices" / "!v"
        self._chunks: list[np.ndarray] = []
        self._callback = _CALLBACK(self._collect)  # kept: ctypes does not hold a reference
        self._rate = self._library.espeak_Initialize(_SYNCHRONOUS, 200, loader.get_data_path().encode(), 0)
        if self._rate <= 0:
            raise RuntimeError(f"espeak-ng did not start with the data in {loader.get_data_path()}")
        self._library.espeak_SetSynthCallback(self._callback)
        # At its start espeak seeds the generator of its breathy voices with the time of day.
        self._library.espeak_ng_SetRandSeed.argtypes = [ctypes.c_long]
        self._library.espeak_ng_SetRandSeed(1)

    def speak(self, sentence: str, voice: str, words_per_minute: int, pitch: int, level: float) -> np.ndarray:
        """Speaks a sentence.

        Args:
          sentence: the text.
          voice: espeak's voice name with variant, such as 'en-us+f2'.
          words_per_minute: speed, 80 to 450.
          pitch: 0 to 100, 50 is the voice's own.
          level: root mean square of the result, full scale 1; lowered where the peak would pass 0.95.

        Returns:
          float32 [N], 16 kHz mono, 50 ms of silence at most on either side.

        Raises:
          ValueError: espeak does not know the voice or stays silent.
        """
        # espeak passes over an unknown variant in silence and speaks in the accent's own voice.
        variant = voice.partition("+")[2]
        known = not variant or (self._variants / variant).is_file()
        if not known or self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {voice!r}: name another in the config's `voices`")
        for parameter, value in ((_RATE, words_per_minute), (_VOLUME, _VOLUME_PERCENT), (_PITCH, pitch)):
            self._library.espeak_SetParameter(parameter, int(value), 0)
        self._chunks.clear()
        text = sentence.encode()
        self._library.espeak_Synth(text, len(text) + 1, 0, _POSITION_CHARACTER, 0, _UTF8, None, None)
        if not self._chunks:
            raise ValueError(f"espeak-ng said nothing for {sentence!r} in voice {voice!r}")
        waveform = np.concatenate(self._chunks).astype(np.float32) / 32768.0
        waveform = trim_silence(resample(waveform, self._rate, SAMPLE_RATE))
        gain = level / np.sqrt(np.mean(np.square(waveform)))
        return waveform * np.float32(min(gain, 0.95 / np.abs(waveform).max()))

    def _collect(self, samples, count, _events):
        if samples and count > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0


def resample(waveform: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    """Polyphase resampling, float32 [N] -> float32 [ceil(N * to_rate / from_rate)].

    As a product with a banded matrix: the same filter as scipy.signal.resample_poly (Kaiser window, beta 5),
    whose import would cost every shard's process more than a second.
    """
    divisor = math.gcd(from_rate, to_rate)
    up, down = to_rate // divisor, from_rate // divisor
    matrix, before = _resampling_matrix(up, down)
    length = -(-len(waveform) * up // down)
    blocks = -(-length // up)
    padded = np.zeros((blocks - 1) * down + len(matrix), np.float32)
    kept = waveform[: len(padded) - before]
    padded[before : before + len(kept)] = kept
    frames = np.lib.stride_tricks.sliding_window_view(padded, len(matrix))[::down]
    return (frames @ matrix).reshape(-1)[:length]


@functools.cache
def _resampling_matrix(up: int, down: int) -> tuple[np.ndarray, int]:
    """Maps a stretch of input to `up` outputs, which advance the input by `down`; and where it starts.

    Output p of a block weighs the input at offset j by the filter at p * down - j * up.
    """
    half = 10 * max(up, down)
    taps = np.sinc(np.arange(-half, half + 1) / max(up, down)) * np.kaiser(2 * half + 1, 5.0)
    taps *= up / taps.sum()
    before = half // up
    offsets = np.arange(-before, ((up - 1) * down + half) // up + 1)
    index = np.arange(up)[None, :] * down - offsets[:, None] * up + half
    inside = (index >= 0) & (index < len(taps))
    return np.where(inside, taps[np.clip(index, 0, len(taps) - 1)], 0.0).astype(np.float32), before


def trim_silence(waveform: np.ndarray) -> np.ndarray:
    """Cuts both ends down to 50 ms before the first and after the last sample above 2 % of the peak."""
    loud = np.flatnonzero(np.abs(waveform) > 0.02 * np.abs(waveform).max())
    margin = int(_MARGIN_SECONDS * SAMPLE_RATE)
    return waveform[max(loud[0] - margin, 0) : loud[-1] + margin + 1]
