"""wav2vec 2.0 (arXiv 2006.11477): waveform in, one contextual vector per 20 ms out.

The same module holds every published size: base (group norm in the first convolution, norm after each block)
and large (layer norm in every convolution, norm before each block); `configs/encoders/wav2vec2.py` names the
fields. Letters: B batch, N waveform samples at 16 kHz, F frames, D width, L layers, C channels of the
convolutions, K letters.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from ml_collections import ConfigDict

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


def receptive_field(config: ConfigDict) -> int:
    """Samples that one frame sees; shorter clips have none."""
    samples = 1
    for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
        samples = (samples - 1) * stride + kernel
    return samples


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


def model_input(waveforms: jax.Array, lengths: jax.Array, config: ConfigDict) -> jax.Array:
    """Raw waveforms [B, N] as the model of `config` takes them: normalised where it says so."""
    return normalize_waveforms(waveforms, lengths) if config.normalize_waveforms else waveforms


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
