"""Layers of wav2vec 2.0 (arXiv 2006.11477, section 2): convolutions over the waveform, positional
convolution, attention.

Letters: B batch, N waveform samples or frames of an inner layer, F frames, D width, H heads, G groups, C
channels. Computation follows the dtype of inputs and parameters; norms and softmax are done in at least
float32.
"""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from opt_jax.models.layers import gelu, product

# The published feature encoders keep torch's default whatever `layer_norm_eps` says.
CONV_NORM_EPS = 1e-5


def dense(features: int, axes: tuple[str, str], name: str, scale: float | None = None) -> nn.Dense:
    """Dense layer, logical `axes` for its kernel [in, out]; initial deviation `scale` or in ** -0.5."""
    init = nn.initializers.lecun_normal() if scale is None else nn.initializers.normal(scale)
    init = nn.with_logical_partitioning(init, axes)
    return nn.Dense(
        features, kernel_init=init, dot_general=lambda x, kernel, *_, **__: product(x, kernel), name=name
    )


def strided_convolution(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Convolution over time: x [B, N, C_in], kernel [K, C_in, C_out] -> [B, (N - K) // stride + 1, C_out]."""
    return jax.lax.conv_general_dilated(
        x, kernel, (stride,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
    )


def group_norm_over_time(x: jax.Array, valid: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """Normalises every channel of every clip over its own valid time steps.

    x [B, N, C], valid [B, N] bool, scale and bias [C] -> [B, N, C]. Equal to torch's GroupNorm(C, C) of each
    clip run alone without padding; the reference run on a padded batch takes the padding into its statistics.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    weights = valid[..., None].astype(wide.dtype)
    count = jnp.maximum(weights.sum(axis=1, keepdims=True), 1)
    mean = (wide * weights).sum(axis=1, keepdims=True) / count
    variance = (jnp.square(wide - mean) * weights).sum(axis=1, keepdims=True) / count
    factor = jax.lax.rsqrt(variance + CONV_NORM_EPS) * scale
    return (wide * factor + (bias - mean * factor)).astype(x.dtype)


class ConvLayer(nn.Module):
    """One layer of the feature encoder: convolution, norm ('group', 'layer' or None), exact GELU."""

    features: int
    kernel_size: int
    stride: int
    use_bias: bool
    norm: str | None

    @nn.compact
    def __call__(self, x: jax.Array, valid: jax.Array) -> jax.Array:
        """x [B, N, C_in] and the validity [B, N_out] of the output -> [B, N_out, features]."""
        shape = (self.kernel_size, x.shape[-1], self.features)
        x = strided_convolution(x, self.param("kernel", nn.initializers.he_normal(), shape), self.stride)
        if self.use_bias:
            x = x + self.param("bias", nn.initializers.zeros, (self.features,))
        if self.norm == "group":
            scale = self.param("norm_scale", nn.initializers.ones, (self.features,))
            bias = self.param("norm_bias", nn.initializers.zeros, (self.features,))
            x = group_norm_over_time(x, valid, scale, bias)
        elif self.norm == "layer":
            x = nn.LayerNorm(epsilon=CONV_NORM_EPS, name="norm")(x)
        return gelu(x)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def grouped_convolution(x: jax.Array, kernel: jax.Array, groups: int) -> jax.Array:
    """Grouped convolution over time that keeps the length.

    x [B, F, D], kernel [K, D / groups, D] -> [B, F, D], with K // 2 zeros before and K - 1 - K // 2 after.
    The gradient is that of `convolution_by_products`: XLA's own is slow on CPU.
    """
    size = kernel.shape[0]
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (1,),
        [(size // 2, size - 1 - size // 2)],
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=groups,
    )


def _with_operands(x, kernel, groups):
    return grouped_convolution(x, kernel, groups), (x, kernel)


def _gradients(groups, operands, cotangent):
    _, transposed = jax.vjp(lambda x, kernel: convolution_by_products(x, kernel, groups), *operands)
    return transposed(cotangent)


grouped_convolution.defvjp(_with_operands, _gradients)


def convolution_by_products(x: jax.Array, kernel: jax.Array, groups: int) -> jax.Array:
    """As `grouped_convolution`, as matrix products.

    `block` neighbouring outputs of a group are one product of the inputs they see with a block-Toeplitz
    matrix of the kernel; unfolding the input would take K times its memory.
    """
    batch, frames, width = x.shape
    size, inputs, _ = kernel.shape
    outputs = width // groups
    block = max(1, min(size, 256 // outputs))
    num_blocks = -(-frames // block)
    spans = -(-(block + size - 1) // block)  # blocks of input that one block of output sees
    total = (num_blocks + spans - 1) * block
    x = jnp.pad(x, ((0, 0), (size // 2, total - frames - size // 2), (0, 0)))
    x = x.reshape(batch, num_blocks + spans - 1, block, groups, inputs).transpose(3, 0, 1, 2, 4)
    x = x.reshape(groups, batch, num_blocks + spans - 1, block * inputs)
    x = jnp.concatenate([x[:, :, i : i + num_blocks] for i in range(spans)], axis=-1)
    kernel = kernel.reshape(size, inputs, groups, outputs)
    toeplitz = jnp.stack(
        [jnp.pad(kernel, ((i, spans * block - size - i), (0, 0), (0, 0), (0, 0))) for i in range(block)],
        axis=3,
    )
    toeplitz = toeplitz.transpose(2, 0, 1, 3, 4).reshape(groups, spans * block * inputs, block * outputs)
    y = jnp.einsum("gbnk,gko->gbno", x, toeplitz)
    y = y.reshape(groups, batch, num_blocks * block, outputs)[:, :, :frames]
    return y.transpose(1, 2, 0, 3).reshape(batch, frames, width)


class PositionalConvolution(nn.Module):
    """Relative positions by a grouped convolution under weight normalisation, then GELU.

    The direction `v` [K, D / groups, D] and the length `g` [K] of every kernel position are the parameters
    and are folded at apply, so that published weights go in and out exactly.
    """

    kernel_size: int
    groups: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, F, D] -> [B, F, D]."""
        width = x.shape[-1]
        shape = (self.kernel_size, width // self.groups, width)
        deviation = 2.0 / (self.kernel_size * width) ** 0.5
        v = self.param("v", nn.initializers.normal(deviation), shape)
        length = nn.initializers.constant(deviation * (shape[1] * width) ** 0.5)
        g = self.param("g", length, (self.kernel_size,))
        bias = self.param("bias", nn.initializers.zeros, (width,))
        norm = jnp.sqrt(jnp.sum(jnp.square(v), axis=(1, 2)))
        kernel = v * (g / norm)[:, None, None]
        return gelu(grouped_convolution(x, kernel.astype(x.dtype), self.groups) + bias)


class Attention(nn.Module):
    """Multi-head self-attention with biases on all four projections."""

    num_heads: int
    dropout: float
    scale: float

    @nn.compact
    def __call__(self, x: jax.Array, valid: jax.Array, deterministic: bool) -> jax.Array:
        """x [B, F, D], valid [B, F] bool (True may be attended) -> [B, F, D]."""
        width = x.shape[-1]
        depth = width // self.num_heads

        def weights_of(name, shape, axes):
            init = nn.with_logical_partitioning(nn.initializers.normal(self.scale), axes)
            return self.param(f"{name}_kernel", init, shape)

        def project(name):
            kernel = weights_of(name, (width, self.num_heads, depth), ("embed", "heads", "kv"))
            bias = self.param(f"{name}_bias", nn.initializers.zeros, (self.num_heads, depth))
            return product(x, kernel) + bias

        query, key, value = project("query") * depth**-0.5, project("key"), project("value")
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key)
        scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
        scores = jnp.where(valid[:, None, None, :], scores, jnp.finfo(scores.dtype).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        weights = nn.Dropout(self.dropout)(weights, deterministic=deterministic)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        kernel = weights_of("output", (self.num_heads, depth, width), ("heads", "kv", "embed"))
        bias = self.param("output_bias", nn.initializers.zeros, (width,))
        return product(mixed.reshape(x.shape), kernel.reshape(width, width)) + bias


class EncoderLayer(nn.Module):
    """Transformer layer, norm after each block (base) or before it (`stable_layer_norm`, large)."""

    config: ConfigDict
    deterministic: bool

    @nn.compact
    def __call__(self, x: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x [B, F, D], valid [B, F] -> (output, output): the carry and the collected state of a scan."""
        c = self.config
        attend = Attention(c.num_heads, c.attention_dropout, c.initializer_range, name="attention")
        attention_norm = nn.LayerNorm(epsilon=c.layer_norm_eps, name="attention_norm")
        feed_forward_norm = nn.LayerNorm(epsilon=c.layer_norm_eps, name="feed_forward_norm")

        def drop(rate, y):
            return nn.Dropout(rate)(y, deterministic=self.deterministic)

        def feed_forward(y):
            y = gelu(dense(c.intermediate_size, ("embed", "mlp"), "intermediate", c.initializer_range)(y))
            y = dense(c.hidden_size, ("mlp", "embed"), "output", c.initializer_range)(
                drop(c.activation_dropout, y)
            )
            return drop(c.hidden_dropout, y)

        if c.stable_layer_norm:
            y = x + drop(c.hidden_dropout, attend(attention_norm(x), valid, self.deterministic))
            y = y + feed_forward(feed_forward_norm(y))
        else:
            y = attention_norm(x + drop(c.hidden_dropout, attend(x, valid, self.deterministic)))
            y = feed_forward_norm(y + feed_forward(y))
        if c.layerdrop > 0 and not self.deterministic:
            y = jnp.where(jax.random.bernoulli(self.make_rng("dropout"), c.layerdrop), x, y)
        return y, y
