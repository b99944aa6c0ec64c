"""wav2vec 2.0 (arXiv 2006.11477): waveform in, one contextual vector per 20 ms out.

The same module holds every published size: base (group norm in the first convolution, norm after each block)
and large (layer norm in every convolution, norm before each block); `configs/encoders/wav2vec2.py` names the
fields. Letters: B batch, N waveform samples at 16 kHz, F frames, D width, L layers, C channels of the
convolutions, K letters.
"""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from ml_collections import ConfigDict, FrozenConfigDict

from opt_jax.encoders.wav2vec2_layers import ConvLayer, EncoderLayer, PositionalConvolution, dense

SAMPLE_RATE = 16_000


@struct.dataclass
class Wav2Vec2Output:
    """What one forward pass gives.

    conv_features [B, F, C] before and normalized_features [B, F, C] after the layer norm of the projection
    (the quantizer reads the latter); hidden_states [L + 1, B, F, D]: the transformer's input, then each
    layer's output; last_hidden_state [B, F, D] (with the final norm where norms come first); frame_valid [B,
    F] bool.
    """

    conv_features: jax.Array
    normalized_features: jax.Array
    hidden_states: jax.Array
    last_hidden_state: jax.Array
    frame_valid: jax.Array


def frame_count(lengths, config: ConfigDict):
    """Frames of clips of `lengths` samples (int or array): floor((n - kernel) / stride) + 1 a layer, >= 0."""
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        lengths = (lengths - kernel) // stride + 1
    return lengths * (lengths > 0)


def normalize_waveforms(waveforms: jax.Array, lengths: jax.Array) -> jax.Array:
    """Zero mean, unit variance over the valid samples of each clip, then zeros: what published models expect.

    waveforms [B, N] float, lengths [B] int -> [B, N].
    """
    valid = jnp.arange(waveforms.shape[1]) < lengths[:, None]
    count = jnp.maximum(lengths, 1)[:, None]
    mean = jnp.where(valid, waveforms, 0).sum(axis=1, keepdims=True) / count
    centred = jnp.where(valid, waveforms - mean, 0)
    variance = jnp.square(centred).sum(axis=1, keepdims=True) / count
    return centred * jax.lax.rsqrt(variance + 1e-7)


class FeatureEncoder(nn.Module):
    """The convolutional stack: [B, N] -> [B, F, C], one frame per product of the strides."""

    config: ConfigDict

    @nn.compact
    def __call__(self, waveforms: jax.Array, lengths: jax.Array) -> jax.Array:
        c = self.config
        if c.feature_norm not in ("group", "layer"):
            raise ValueError(f"model.feature_norm: expected 'group' or 'layer', found {c.feature_norm!r}")
        x = waveforms[..., None]
        for i, (features, kernel, stride) in enumerate(
            zip(c.conv_dim, c.conv_kernel, c.conv_stride, strict=True)
        ):
            lengths = (lengths - kernel) // stride + 1
            frames = (x.shape[1] - kernel) // stride + 1
            if frames < 1:
                raise ValueError(
                    f"waveforms of {waveforms.shape[1]} samples give no frame at convolution {i}: pad them"
                )
            valid = jnp.arange(frames) < lengths[:, None]
            norm = "layer" if c.feature_norm == "layer" else ("group" if i == 0 else None)
            x = ConvLayer(features, kernel, stride, c.conv_bias, norm, name=f"conv_{i}")(x, valid)
        return x


class Wav2Vec2(nn.Module):
    """Feature encoder, projection, positional convolution, transformer."""

    config: ConfigDict
    freeze_feature_encoder: bool = False

    @nn.compact
    def __call__(
        self,
        waveforms: jax.Array,
        lengths: jax.Array,
        mask: jax.Array | None = None,
        deterministic: bool = True,
    ) -> Wav2Vec2Output:
        """waveforms [B, N] normalized, lengths [B]; mask [B, F] bool: frames that the mask vector replaces.

        Frames that would see a sample past a clip's length are not valid: they are zeroed before the
        transformer, attended by nobody, and their own outputs are meaningless.
        """
        c = self.config
        conv_features = FeatureEncoder(c, name="feature_encoder")(waveforms, lengths)
        valid = jnp.arange(conv_features.shape[1]) < frame_count(lengths, c)[:, None]
        if self.freeze_feature_encoder:
            conv_features = jax.lax.stop_gradient(conv_features)

        def drop(rate, y):
            return nn.Dropout(rate)(y, deterministic=deterministic)

        normalized = nn.LayerNorm(epsilon=c.layer_norm_eps, name="projection_norm")(conv_features)
        x = dense(c.hidden_size, ("feature", "embed"), "projection", c.initializer_range)(normalized)
        x = drop(c.projection_dropout, x)
        mask_embedding = self.param("mask_embedding", nn.initializers.uniform(1.0), (c.hidden_size,))
        if mask is not None:
            x = jnp.where(mask[..., None], mask_embedding.astype(x.dtype), x)
        x = jnp.where(valid[..., None], x, 0)
        x = x + PositionalConvolution(c.position_kernel, c.position_groups, name="position")(x)
        final_norm = nn.LayerNorm(epsilon=c.layer_norm_eps, name="norm")
        if not c.stable_layer_norm:
            x = final_norm(x)
        x = drop(c.hidden_dropout, x)
        layers = nn.scan(
            EncoderLayer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=c.num_layers,
            unroll=min(c.unroll, c.num_layers),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        last, outputs = layers(c, deterministic, name="layers")(x, valid)
        return Wav2Vec2Output(
            conv_features=conv_features,
            normalized_features=normalized,
            hidden_states=jnp.concatenate([x[None], outputs]),
            last_hidden_state=final_norm(last) if c.stable_layer_norm else last,
            frame_valid=valid,
        )


class Wav2Vec2ForCTC(nn.Module):
    """wav2vec 2.0 with a linear layer onto the blank and the letters (section 3.3)."""

    config: ConfigDict
    freeze_feature_encoder: bool = False

    @nn.compact
    def __call__(
        self,
        waveforms: jax.Array,
        lengths: jax.Array,
        mask: jax.Array | None = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, jax.Array]:
        """As `Wav2Vec2`; returns (logits [B, F, K], frame_valid [B, F])."""
        encoder = Wav2Vec2(self.config, self.freeze_feature_encoder, name="wav2vec2")
        output = encoder(waveforms, lengths, mask, deterministic)
        x = nn.Dropout(self.config.final_dropout)(output.last_hidden_state, deterministic=deterministic)
        head = dense(
            len(self.config.vocabulary), ("embed", "class"), "ctc_head", self.config.initializer_range
        )
        return head(x), output.frame_valid


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
    """The frozen encoder as a function: raw waveforms to features, and to letters where there is a CTC head.

    `params` is the tree that the recipe froze ({'wav2vec2': ..., 'ctc_head': ...}), `config` its model
    configuration. Clips of a batch are padded to the next multiple of `bucket` samples, so that few shapes
    are compiled.
    """

    def __init__(self, params, config: ConfigDict, bucket: int = SAMPLE_RATE):
        self.config = FrozenConfigDict(config)
        self.params = jax.tree.map(jnp.asarray, params)
        self.bucket = bucket

    def extract(self, waveforms: np.ndarray, lengths: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """waveforms [B, N] f32 raw, lengths [B] -> (features [B, F, D], zero past the end; counts [B])."""
        return _extract(self.params["wav2vec2"], *self._pad(waveforms, lengths), config=self.config)

    def logits(self, waveforms: np.ndarray, lengths: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """waveforms [B, N] f32 raw, lengths [B] -> (CTC logits [B, F, K], frame counts [B])."""
        params = {name: self.params[name] for name in ("wav2vec2", "ctc_head")}
        return _logits(params, *self._pad(waveforms, lengths), config=self.config)

    def _pad(self, waveforms, lengths):
        waveforms, lengths = np.asarray(waveforms), np.asarray(lengths, np.int32)
        if waveforms.ndim != 2 or lengths.shape != waveforms.shape[:1]:
            raise ValueError(
                f"expected waveforms [B, N] and lengths [B], found {waveforms.shape} and {lengths.shape}"
            )
        buckets = max(1, -(-waveforms.shape[1] // self.bucket))  # one even for clips without a sample
        missing = buckets * self.bucket - waveforms.shape[1]
        return np.pad(waveforms, ((0, 0), (0, missing))), lengths


@partial(jax.jit, static_argnames="config")
def _extract(params, waveforms, lengths, config):
    output = Wav2Vec2(config).apply({"params": params}, normalize_waveforms(waveforms, lengths), lengths)
    features = select_features(output, config.features)
    return jnp.where(output.frame_valid[..., None], features, 0), output.frame_valid.sum(axis=1)


@partial(jax.jit, static_argnames="config")
def _logits(params, waveforms, lengths, config):
    logits, valid = Wav2Vec2ForCTC(config).apply(
        {"params": params}, normalize_waveforms(waveforms, lengths), lengths
    )
    return logits, valid.sum(axis=1)
