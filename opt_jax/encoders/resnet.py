"""ResNet with frozen batch normalisation, as region detectors use it (arXiv 1512.03385; NHWC).

`ResNetTrunk` is the picture's convolutional map "C4" (stem, res2, res3, res4); the detector's head
runs `ResidualStage` (res5) on every region. Names and strides follow the common PyTorch layout:
stem 7x7 and max pool, then bottlenecks 1x1, 3x3, 1x1.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

# Bottlenecks in res2, res3, res4, res5.
STAGE_SIZES = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
EXPANSION = 4
CALIBRATION = "calibration"


class FrozenBatchNorm(nn.Module):
    """x -> (x - mean) / sqrt(var + epsilon) * scale + bias with `mean`, `var` constant, per channel.

    The statistics are parameters (so they load and save with the rest) but get no gradient. For
    training from scratch they are measured once: applied with the collection `calibration`
    mutable, the layer normalises by this batch's statistics and records them there, so that every
    later layer sees calibrated input (see `with_calibration`).
    """

    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1],)

        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        mean = self.param("mean", nn.initializers.zeros, shape)
        var = self.param("var", nn.initializers.ones, shape)
        if self.is_mutable_collection(CALIBRATION) and not self.is_initializing():
            axes = tuple(range(x.ndim - 1))
            mean, var = x.mean(axes), x.var(axes)
            self.variable(CALIBRATION, "mean", lambda: mean).value = mean
            self.variable(CALIBRATION, "var", lambda: var).value = var
        mean, var = jax.lax.stop_gradient((mean, var))
        factor = scale * jax.lax.rsqrt(var + self.epsilon)
        return x * factor.astype(x.dtype) + (bias - mean * factor).astype(x.dtype)


def blank(x: jax.Array, sizes: jax.Array | None) -> jax.Array:
    """x [B, H, W, C] with zeros beyond the first `sizes` [B, 2] rows and columns; None: nothing is beyond.

    Before every convolution that sees neighbours, this makes a picture in the corner of a larger canvas give
    what it gives alone, where zeros pad its border.
    """
    if sizes is None:
        return x
    rows = jnp.arange(x.shape[1]) < sizes[:, :1]
    columns = jnp.arange(x.shape[2]) < sizes[:, 1:]
    return jnp.where((rows[:, :, None] & columns[:, None, :])[..., None], x, 0)


def divided(sizes: jax.Array | None, stride: int) -> jax.Array | None:
    """Cells [B, 2] that a convolution of this stride makes of `sizes`."""
    return None if sizes is None else -(-sizes // stride)


class Convolution(nn.Module):
    """k x k convolution of [B, H, W, C] with padding of dilation * (k - 1) / 2 on every side."""

    features: int
    kernel: int
    stride: int = 1
    dilation: int = 1
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.kernel, self.kernel, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        kernel = kernel.astype(x.dtype)
        if self.kernel == 1:
            # A plain matrix product: XLA on CPU runs its gradient three times as fast as a 1x1 convolution's.
            x = x[:, :: self.stride, :: self.stride] @ kernel[0, 0]
        else:
            pad = self.dilation * (self.kernel - 1) // 2
            x = jax.lax.conv_general_dilated(
                x,
                kernel,
                (self.stride, self.stride),
                [(pad, pad), (pad, pad)],
                rhs_dilation=(self.dilation, self.dilation),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
        if self.use_bias:
            x = x + self.param("bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)
        return x


def max_pool(x: jax.Array, caffe: bool = False) -> jax.Array:
    """3x3 maximum with stride 2 and padding 1: [B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), C].

    With `caffe` no padding before, and windows that reach over the end: [B, floor(H / 2), floor(W / 2), C].
    A maximum of shifted slices, axis by axis: XLA's windowed maximum has a gradient six times slower on CPU.
    """
    for axis in (1, 2):
        size = x.shape[axis]
        count = size // 2 if caffe else (size + 1) // 2
        around = (0, 1) if caffe else (1, 1)
        widths = [around if a == axis else (0, 0) for a in range(4)]
        padded = jnp.pad(x, widths, constant_values=jnp.finfo(x.dtype).min)
        at = [jax.lax.slice_in_dim(padded, i, i + 2 * count - 1, 2, axis) for i in range(3)]
        x = jnp.maximum(jnp.maximum(at[0], at[1]), at[2])
    return x


class Bottleneck(nn.Module):
    """1x1 (width), 3x3 (width), 1x1 (4 * width) with a shortcut, projected where the shape changes.

    The stride sits on the 3x3, or on the first 1x1 (`stride_in_1x1`, the original Caffe networks).
    """

    width: int
    stride: int = 1
    dilation: int = 1
    stride_in_1x1: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, sizes: jax.Array | None = None) -> jax.Array:
        first, second = (self.stride, 1) if self.stride_in_1x1 else (1, self.stride)
        y = Convolution(self.width, 1, first, name="conv1")(x)
        y = blank(nn.relu(FrozenBatchNorm(name="norm1")(y)), divided(sizes, first))
        y = Convolution(self.width, 3, second, self.dilation, name="conv2")(y)
        y = nn.relu(FrozenBatchNorm(name="norm2")(y))
        y = Convolution(EXPANSION * self.width, 1, name="conv3")(y)
        y = FrozenBatchNorm(name="norm3")(y)
        if self.stride != 1 or x.shape[-1] != EXPANSION * self.width:
            x = Convolution(EXPANSION * self.width, 1, self.stride, name="shortcut")(x)
            x = FrozenBatchNorm(name="shortcut_norm")(x)
        return nn.relu(x + y)


class ResidualStage(nn.Module):
    """`blocks` bottlenecks, the first with the stride: [B, H, W, C] -> [B, H / s, W / s, 4 * width].

    `sizes` [B, 2]: rows and columns of x that are the picture's, see `blank`.
    """

    blocks: int
    width: int
    stride: int = 1
    dilation: int = 1
    stride_in_1x1: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, sizes: jax.Array | None = None) -> jax.Array:
        for i in range(self.blocks):
            stride = self.stride if i == 0 else 1
            x = Bottleneck(self.width, stride, self.dilation, self.stride_in_1x1, name=f"block{i}")(x, sizes)
            sizes = divided(sizes, stride)
        return x


class ResNetTrunk(nn.Module):
    """Normalised picture [B, H, W, 3] -> C4 map [B, H / s, W / s, 16 * width], s = 4 * product of `strides`.

    Attributes:
      stage_sizes: bottlenecks in res2, res3, res4.
      width: channels of the stem and of res2's 3x3; each later stage doubles it.
      strides: of res2, res3, res4; (1, 2, 2) gives the usual 16 pixels a cell, (1, 2, 1) gives 8.
      caffe_pooling: after the stem, see `max_pool`.
    """

    stage_sizes: Sequence[int] = STAGE_SIZES[101][:3]
    width: int = 64
    strides: Sequence[int] = (1, 2, 2)
    stride_in_1x1: bool = False
    caffe_pooling: bool = False

    def cells(self, sizes: jax.Array, stages: int | None = None) -> jax.Array:
        """Rows and columns [B, 2] of the map that a picture of `sizes` i32 [B, 2] pixels covers, after the
        first `stages` stages."""
        sizes = divided(sizes, 2)
        sizes = sizes // 2 if self.caffe_pooling else divided(sizes, 2)
        for stride in self.strides[:stages]:
            sizes = divided(sizes, stride)
        return sizes

    @nn.compact
    def __call__(self, x: jax.Array, sizes: jax.Array | None = None) -> jax.Array:
        """x [B, H, W, 3]; `sizes` i32 [B, 2]: (height, width) of the picture in x, None where it fills x."""
        x = Convolution(self.width, 7, 2, name="stem")(blank(x, sizes))
        x = blank(nn.relu(FrozenBatchNorm(name="stem_norm")(x)), divided(sizes, 2))
        x = max_pool(x, self.caffe_pooling)
        for i, (blocks, stride) in enumerate(zip(self.stage_sizes, self.strides, strict=True)):
            stage = ResidualStage(
                blocks, self.width * 2**i, stride, stride_in_1x1=self.stride_in_1x1, name=f"res{i + 2}"
            )
            x = stage(x, None if sizes is None else self.cells(sizes, i))
        return x


def with_calibration(params: dict, calibration: dict) -> dict:
    """`params` with the statistics that one forward recorded in the collection `calibration` put in.

    Both are nested dicts of the same module; only the frozen norms' `mean` and `var` change.
    """
    merged = dict(params)
    for name, value in calibration.items():
        merged[name] = with_calibration(params[name], value) if isinstance(value, dict) else value
    return merged
