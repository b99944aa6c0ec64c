"""ResNet with frozen batch normalisation, as region detectors use it (arXiv 1512.03385).

Letters: B pictures or regions, C channels, H and W pixels or cells.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

EXPANSION = 4


class Convolution(nn.Conv2d):
    """Keeps the size but for the stride; computes in the dtype of its input."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride=1, dilation=1, bias=False):
        padding = dilation * (kernel - 1) // 2
        super().__init__(inputs, outputs, kernel, stride, padding, dilation, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return self._conv_forward(x, self.weight.to(x.dtype), bias)


class FrozenNorm(nn.Module):
    """(x - mean) / sqrt(var + epsilon) * weight + bias with constants, per channel of [B, C, H, W]."""

    def __init__(self, channels: int, epsilon: float = 1e-5):
        super().__init__()
        self.epsilon = epsilon
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        factor = self.weight * torch.rsqrt(self.running_var + self.epsilon)
        shift = self.bias - self.running_mean * factor
        return x * factor.to(x.dtype)[:, None, None] + shift.to(x.dtype)[:, None, None]


class Bottleneck(nn.Module):
    """1x1 (width), 3x3 (width), 1x1 (4 * width) with a shortcut, projected where the shape changes.

    The stride is that of the 3x3, or of the first 1x1 (`stride_in_1x1`, the original Caffe networks).
    """

    def __init__(self, inputs: int, width: int, stride: int, dilation: int, stride_in_1x1: bool):
        super().__init__()
        first, second = (stride, 1) if stride_in_1x1 else (1, stride)
        outputs = EXPANSION * width
        self.conv1, self.norm1 = Convolution(inputs, width, 1, first), FrozenNorm(width)
        self.conv2, self.norm2 = Convolution(width, width, 3, second, dilation), FrozenNorm(width)
        self.conv3, self.norm3 = Convolution(width, outputs, 1), FrozenNorm(outputs)
        self.shortcut = None
        if stride != 1 or inputs != outputs:
            self.shortcut, self.shortcut_norm = Convolution(inputs, outputs, 1, stride), FrozenNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(x)).relu()
        y = self.norm2(self.conv2(y)).relu()
        y = self.norm3(self.conv3(y))
        return ((x if self.shortcut is None else self.shortcut_norm(self.shortcut(x))) + y).relu()


class ResidualStage(nn.Sequential):
    """`blocks` bottlenecks, the first with the stride: [B, C, H, W] to [B, 4 * width, H / s, W / s]."""

    def __init__(self, blocks: int, inputs: int, width: int, stride=1, dilation=1, stride_in_1x1=False):
        super().__init__()
        for i in range(blocks):
            block = Bottleneck(inputs, width, stride if i == 0 else 1, dilation, stride_in_1x1)
            self.add_module(f"block{i}", block)
            inputs = EXPANSION * width


class ResNetTrunk(nn.Module):
    """Normalised picture [B, 3, H, W] to the map "C4" [B, 16 * width, h, w]. config: of the detector."""

    def __init__(self, config: dict):
        super().__init__()
        self.caffe_pooling, width = config["caffe_pooling"], config["width"]
        self.stem, self.stem_norm = Convolution(3, width, 7, 2), FrozenNorm(width)
        inputs = width
        for i, (blocks, stride) in enumerate(zip(config["stage_sizes"][:3], config["strides"], strict=True)):
            stage = ResidualStage(blocks, inputs, width * 2**i, stride, 1, config["stride_in_1x1"])
            self.add_module(f"res{i + 2}", stage)
            inputs = EXPANSION * width * 2**i

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_norm(self.stem(x)).relu()
        padding = 0 if self.caffe_pooling else 1  # Caffe's windows reach over the end instead
        x = functional.max_pool2d(x, 3, 2, padding, ceil_mode=self.caffe_pooling)
        return self.res4(self.res3(self.res2(x)))
