"""Recordings as wav2vec 2.0 (arXiv 2006.11477) takes them, and its features.

Letters: N samples, F frames, D numbers of a frame.
"""

import json
import math
import numbers
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Wav2Vec2ForCTC, Wav2Vec2ForPreTraining, Wav2Vec2Model

SAMPLE_RATE = 16_000
SHORTEST = 400  # samples, 25 ms
QUIETEST = 1e-5  # of full scale: below the last bit of 16
LOUDEST = 1e6  # 16-bit numbers that nobody scaled stay far below
RATES = (1_000, 400_000)  # samples a second
MAX_NUMBERS = 1 << 26  # samples of all channels together
KAISER_BETA, CROSSINGS = 5.0, 10  # of the filter that resamples
CLASSES = {module.__name__: module for module in (Wav2Vec2Model, Wav2Vec2ForCTC, Wav2Vec2ForPreTraining)}


def as_waveform(recording, sampling_rate: int = SAMPLE_RATE, seconds: float = 1800) -> np.ndarray:
    """float32 [N] at 16 kHz of a sound file's name, or of samples [n] or [n, channels] from -1 to 1.

    sampling_rate: of samples; a file tells its own. seconds: of the beginning, which are used; what comes
    later is not looked at.

    Raises: ValueError: these are silent, too short, too loud, not finite, or no sound.
    """
    if isinstance(recording, str | os.PathLike):
        recording, sampling_rate = from_file(recording, seconds)
    if isinstance(recording, numbers.Number):
        raise ValueError("a list is one of recordings, not of samples; give samples as a numpy array")
    check_rate(sampling_rate)
    waveform = np.asarray(recording)
    if waveform.dtype.kind != "f" or waveform.ndim not in (1, 2):
        found = f"{waveform.dtype} {list(waveform.shape)}"
        raise ValueError(f"the recording is {found}, expected floats [samples] or [samples, channels]")
    if waveform.ndim == 2 and waveform.shape[0] < waveform.shape[1]:
        found = f"has more channels than samples, {list(waveform.shape)}"
        raise ValueError(f"the recording {found}; expected [samples, channels], so transpose it")
    waveform = waveform[: samples_needed(seconds, sampling_rate)]
    if waveform.size > MAX_NUMBERS:
        raise ValueError(f"the recording has {list(waveform.shape)} samples and channels; cut it")
    waveform = waveform.astype(np.float32)
    waveform = waveform.mean(1) if waveform.ndim == 2 else waveform
    waveform = resampled(waveform, sampling_rate)[: int(seconds * SAMPLE_RATE)]
    if len(waveform) < SHORTEST:
        raise ValueError(f"the recording has {len(waveform)} samples at 16 kHz; it needs {SHORTEST}")
    loudest = np.abs(waveform).max()
    if not np.isfinite(loudest) or loudest < QUIETEST:
        raise ValueError("the recording is silent, or has samples that are not finite")
    if loudest > LOUDEST:
        raise ValueError(f"the recording has samples up to {loudest:.0e}; they lie between -1 and 1")
    return waveform


def from_file(name, seconds: float) -> tuple[np.ndarray, int]:
    """(float32 [n, channels], rate) of the beginning of a sound file, as far as `seconds` need it."""
    try:
        import soundfile
    except ImportError as error:
        told = "reading a sound file needs the package soundfile; or give its samples and sampling_rate"
        raise ValueError(f"{name}: {told}") from error
    if not Path(name).is_file():
        raise ValueError(f"{name}: there is no such file")
    try:
        with soundfile.SoundFile(name) as file:
            check_rate(rate := file.samplerate)
            needed = min(samples_needed(seconds, rate), file.frames)
            if needed * file.channels > MAX_NUMBERS:
                raise ValueError(f"{file.channels} channels of {needed} samples; cut it")
            return file.read(needed, dtype="float32", always_2d=True), rate
    except Exception as error:  # decoders raise all kinds on damaged files
        raise ValueError(f"{name} cannot be used as sound: {error}") from error


def check_rate(rate) -> None:
    """Raises ValueError unless it is a whole number in RATES."""
    if not isinstance(rate, numbers.Integral) or not RATES[0] <= rate <= RATES[1]:
        raise ValueError(f"sampling_rate is {rate!r}, expected a whole number from {RATES[0]} to {RATES[1]}")


def phases_of(rate: int) -> tuple[int, int, int]:
    """(up, down, half): 16 kHz / rate as a fraction, and half the length of the filter between the two."""
    common = math.gcd(rate, SAMPLE_RATE)
    up, down = SAMPLE_RATE // common, int(rate) // common
    return up, down, CROSSINGS * max(up, down)


def samples_needed(seconds: float, rate: int) -> int:
    """Samples at `rate` of which the first int(16,000 * seconds) at 16 kHz are made, with the filter's
    margin."""
    up, down, half = phases_of(rate)
    return (int(seconds * SAMPLE_RATE) * down + half) // up + 1


def resampled(waveform: np.ndarray, rate: int) -> np.ndarray:
    """float32 [n] at `rate` samples a second as float32 [N] at 16 kHz.

    By a filter of windowed sincs (Oppenheim, Schafer: Discrete-Time Signal Processing, chapter 4), of which
    each output takes one phase.
    """
    if rate == SAMPLE_RATE:
        return waveform
    up, down, half = phases_of(rate)
    time = np.arange(-half, half + 1)
    kernel = np.sinc(time / max(up, down)) * np.kaiser(2 * half + 1, KAISER_BETA)
    kernel *= up / kernel.sum()
    taps = -(-(2 * half + 1) // up)
    phases = np.zeros((taps, up))
    phases.reshape(-1)[: 2 * half + 1] = kernel
    # The output m is at m * down of the signal filled up with zeros, where each `up`-th number is not zero.
    place = np.arange(-(-len(waveform) * up // down)) * down + half
    found = np.zeros(len(place))
    padded = np.pad(waveform.astype(np.float64), (taps, taps))
    for tap in range(taps):
        found += padded[np.minimum(place // up - tap + taps, len(padded) - 1)] * phases[tap, place % up]
    return found.astype(np.float32)


class Speech(nn.Module):
    """wav2vec 2.0 as a function of recordings, of any length.

    Recordings of more than `window_seconds` go through in windows of that length, of which `context_seconds`
    at each end are not kept, but for the ends of the recording.
    """

    def __init__(self, folder: Path, window_seconds: float, context_seconds: float):
        super().__init__()
        config = json.loads((folder / "config.json").read_text())
        preparation = json.loads((folder / "preprocessor_config.json").read_text())
        module = CLASSES[config["architectures"][0]].from_pretrained(folder, dtype="auto")
        self.encoder = getattr(module, "wav2vec2", module).eval().requires_grad_(False)
        self.normalize, self.features = preparation["do_normalize"], config["opt_jax_features"]
        self.kernels, self.strides = config["conv_kernel"], config["conv_stride"]
        self.hop = math.prod(self.strides)
        self.window = round(window_seconds * SAMPLE_RATE / self.hop)
        self.context = round(context_seconds * SAMPLE_RATE / self.hop)

    def frames(self, samples: int) -> int:
        """That come of so many samples."""
        for kernel, stride in zip(self.kernels, self.strides, strict=True):
            samples = (samples - kernel) // stride + 1
        return max(samples, 0)

    @property
    def field(self) -> int:
        """Samples that one frame sees."""
        samples = 1
        for kernel, stride in zip(reversed(self.kernels), reversed(self.strides), strict=True):
            samples = (samples - 1) * stride + kernel
        return samples

    @torch.no_grad()
    def forward(self, waveform: np.ndarray) -> Tensor:
        """A recording [N] at 16 kHz to the features [F, D] of its frames."""
        weight = self.encoder.masked_spec_embed
        x = torch.from_numpy(np.array(waveform)).to(weight.device, weight.dtype)
        if self.normalize:
            x = x - x.mean()
            x = x * torch.rsqrt(x.square().mean() + 1e-7)
        count = self.frames(len(x))
        if count < 1:
            raise ValueError(f"the recording has {len(x)} samples; one frame needs {self.field}")
        if count <= self.window:
            return self.states(x)
        parts, samples = [], self.window * self.hop + self.field - 1
        for first, start, stop in self.windows(count):
            states = self.states(x[first * self.hop : first * self.hop + samples])
            parts.append(states[start - first : stop - first])
        return torch.cat(parts)

    def windows(self, frames: int) -> list[tuple[int, int, int]]:
        """(first, start, stop): frames from `first` on are computed, [start, stop) of the recording kept.

        The last window ends with the recording.
        """
        step = self.window - 2 * self.context
        firsts = [*range(0, frames - self.window, step), frames - self.window]
        starts = [0, *(first + self.context for first in firsts[1:])]
        return list(zip(firsts, starts, [*starts[1:], frames], strict=True))

    def states(self, x: Tensor) -> Tensor:
        """Features [F, D] of samples [N]: the last states, those of the convolutions, or of a layer."""
        if not self.features.isdecimal():
            output = self.encoder(x[None])
            return (output.last_hidden_state if self.features == "context" else output.extract_features)[0]
        number, found = int(self.features), []
        layers = self.encoder.encoder.layers
        if number:
            keep = lambda _, inputs, output: found.append(output)  # noqa: E731
            hook = layers[number - 1].register_forward_hook(keep)
        else:
            keep = lambda _, inputs: found.append(inputs[0])  # noqa: E731
            hook = layers[0].register_forward_pre_hook(keep)
        self.encoder(x[None])
        hook.remove()
        return (found[0][0] if isinstance(found[0], tuple) else found[0])[0]
