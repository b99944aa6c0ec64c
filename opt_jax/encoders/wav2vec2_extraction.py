"""wav2vec 2.0 frozen: functions from raw waveforms to features, letters and audio tokens.

Long recordings go through in overlapping windows, so memory stays that of a few windows. Every window has the
same number of frames; of each the inner part is kept, so that a kept frame saw at least a context on both
sides (the ends of the recording excepted). The waveform is normalised over the whole recording; the group
norm of the base model's first convolution, which averages over time, over each window.

Letters: B batch, N waveform samples at 16 kHz, F frames, D width, K letters, G codebooks.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from opt_jax.encoders.wav2vec2 import (
    SAMPLE_RATE,
    Wav2Vec2,
    Wav2Vec2ForCTC,
    Wav2Vec2Output,
    frame_count,
    normalize_waveforms,
    receptive_field,
)

WINDOW_SECONDS, CONTEXT_SECONDS = 30.0, 2.0
WINDOW_MEMORY = 512 << 20  # bytes of the first convolution's output, the largest array of a call


class Window(NamedTuple):
    """Frames [first, first + length) are computed, [start, stop) of the recording are kept."""

    first: int
    start: int
    stop: int


def windows(frames: int, length: int, context: int) -> list[Window]:
    """Windows of `length` frames over a recording of `frames`; what they keep follows without gap or overlap.

    The last window ends with the recording. A recording of at most `length` frames is one window.

    Raises: ValueError: `length` is not more than twice `context`, so that nothing could be kept.
    """
    step = length - 2 * context
    if step < 1:
        raise ValueError(f"windows of {length} frames keep nothing between contexts of {context}")
    firsts = [*range(0, max(frames - length, 0), step), max(frames - length, 0)]
    starts = [0, *(first + context for first in firsts[1:])]
    return [Window(*row) for row in zip(firsts, starts, [*starts[1:], frames], strict=True)]


def select_features(output: Wav2Vec2Output, features: str) -> jax.Array:
    """'context' (last hidden state), 'conv' (normalized features) or a hidden state's index -> [B, F, *]."""
    if features == "context":
        return output.last_hidden_state
    if features == "conv":
        return output.normalized_features
    count = len(output.hidden_states)
    if features.isdecimal() and int(features) < count:
        return output.hidden_states[int(features)]
    raise ValueError(f"features: expected 'context', 'conv' or an index below {count}, found {features!r}")


def feature_size(config) -> int:
    """The width of what `select_features` gives for `config.features`."""
    return config["conv_dim"][-1] if config["features"] == "conv" else config["hidden_size"]


class Extractor:
    """The frozen encoder as functions of raw waveforms: features, letters (with a CTC head) and audio tokens
    (with a quantizer).

    `params` is the tree that a recipe or the converter froze ({'wav2vec2': ..., 'ctc_head': ..., 'quantizer':
    ...}), `config` its model configuration. Clips of a batch are padded to the next multiple of `bucket`
    samples, so that few shapes are compiled. Recordings of more than `window_seconds` go through in windows
    of that length, a few at a time, of which `context_seconds` at each end are not kept.
    """

    def __init__(
        self,
        params,
        config: ConfigDict,
        bucket: int = SAMPLE_RATE,
        window_seconds: float = WINDOW_SECONDS,
        context_seconds: float = CONTEXT_SECONDS,
    ):
        self.config = FrozenConfigDict(config)
        self.params = jax.tree.map(jnp.asarray, params)
        self.bucket = bucket
        self.hop = math.prod(self.config.conv_stride)
        self.window = round(window_seconds * SAMPLE_RATE / self.hop)
        self.context = round(context_seconds * SAMPLE_RATE / self.hop)

    def extract(self, waveforms: np.ndarray, lengths: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """waveforms [B, N] f32 raw, lengths [B] -> (features [B, F, D], zero past the end; counts [B])."""
        return self._run(_features, waveforms, lengths)

    def logits(self, waveforms: np.ndarray, lengths: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """waveforms [B, N] f32 raw, lengths [B] -> (CTC logits [B, F, K], frame counts [B])."""
        return self._run(_logits, waveforms, lengths)

    def tokens(self, waveforms: np.ndarray, lengths: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """waveforms [B, N] f32 raw, lengths [B] -> (the quantizer's entries i32 [B, F, G], counts [B]).

        Raises: ValueError: the encoder was frozen without its quantizer, as after CTC fine-tuning.
        """
        if "quantizer" not in self.params:
            raise ValueError("this encoder has no quantizer: audio tokens need a pre-trained checkpoint's")
        return self._run(_tokens, waveforms, lengths)

    def _run(self, function, waveforms, lengths):
        waveforms, lengths = np.asarray(waveforms), np.asarray(lengths, np.int32)
        if waveforms.ndim != 2 or lengths.shape != waveforms.shape[:1]:
            raise ValueError(
                f"expected waveforms [B, N] and lengths [B], found {waveforms.shape} and {lengths.shape}"
            )
        normalize = self.config.normalize_waveforms
        if len(lengths) and frame_count(int(lengths.max()), self.config) > self.window:
            return self._run_windows(function, waveforms, lengths, normalize)
        waveforms = _padded(waveforms, self.bucket)
        return function(self.params, waveforms, lengths, config=self.config, normalize=normalize)

    def _run_windows(self, function, waveforms, lengths, normalize: bool):
        """Clip after clip, as many windows at once as WINDOW_MEMORY allows."""
        if normalize:
            waveforms = np.asarray(normalize_waveforms(_padded(waveforms, self.bucket), lengths))
        counts = frame_count(lengths, self.config)
        # As many as give no frame more: so a recording of one window is taken whole, its last samples too.
        samples = self.window * self.hop + receptive_field(self.config) - 1
        largest = samples // self.config.conv_stride[0] * self.config.conv_dim[0] * 4
        together = max(1, WINDOW_MEMORY // largest)
        result = None
        for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            todo = windows(int(count), self.window, self.context)
            for start in range(0, len(todo), together):
                group = todo[start : start + together]
                parts = np.zeros((min(together, len(todo)), samples), np.result_type(waveforms, np.float32))
                sizes = np.zeros(len(parts), np.int32)
                for place, window in enumerate(group):
                    first = window.first * self.hop
                    part = waveforms[row, first : min(first + samples, int(length))]
                    parts[place, : len(part)], sizes[place] = part, len(part)
                found, _ = function(self.params, parts, sizes, config=self.config, normalize=False)
                found = np.asarray(found)
                if result is None:
                    result = np.zeros((len(lengths), max(counts), *found.shape[2:]), found.dtype)
                for states, window in zip(found, group, strict=False):  # the last group may be filled up
                    kept = slice(window.start - window.first, window.stop - window.first)
                    result[row, window.start : window.stop] = states[kept]
        return result, counts


def _padded(waveforms: np.ndarray, bucket: int) -> np.ndarray:
    buckets = max(1, -(-waveforms.shape[1] // bucket))  # one even for clips without a sample
    return np.pad(waveforms, ((0, 0), (0, buckets * bucket - waveforms.shape[1])))


def _encode(params, waveforms, lengths, config, normalize):
    waveforms = normalize_waveforms(waveforms, lengths) if normalize else waveforms
    return Wav2Vec2(config).apply({"params": params["wav2vec2"]}, waveforms, lengths)


@partial(jax.jit, static_argnames=("config", "normalize"))
def _features(params, waveforms, lengths, config, normalize):
    output = _encode(params, waveforms, lengths, config, normalize)
    features = select_features(output, config.features)
    return jnp.where(output.frame_valid[..., None], features, 0), output.frame_valid.sum(axis=1)


@partial(jax.jit, static_argnames=("config", "normalize"))
def _logits(params, waveforms, lengths, config, normalize):
    waveforms = normalize_waveforms(waveforms, lengths) if normalize else waveforms
    params = {name: params[name] for name in ("wav2vec2", "ctc_head")}
    logits, valid = Wav2Vec2ForCTC(config).apply({"params": params}, waveforms, lengths)
    return logits, valid.sum(axis=1)


@partial(jax.jit, static_argnames=("config", "normalize"))
def _tokens(params, waveforms, lengths, config, normalize):
    output = _encode(params, waveforms, lengths, config, normalize)
    layer, codebooks = params["quantizer"]["logits"], params["quantizer"]["codebooks"]
    logits = output.normalized_features @ layer["kernel"] + layer["bias"]
    entries = logits.reshape(*logits.shape[:2], *codebooks.shape[:2]).argmax(-1)
    valid = output.frame_valid
    return jnp.where(valid[..., None], entries, 0).astype(jnp.int32), valid.sum(axis=1)
