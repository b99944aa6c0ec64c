"""ResNet against a plain PyTorch one with batch normalisation in evaluation mode, in float64."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from opt_jax.encoders.resnet import ResidualStage, ResNetTrunk

torch = pytest.importorskip("torch")
functional = torch.nn.functional


class _Block(torch.nn.Module):
    def __init__(self, inputs, width, stride, dilation, stride_in_1x1):
        super().__init__()
        first, second = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = torch.nn.Conv2d(inputs, width, 1, first, bias=False)
        self.norm1 = torch.nn.BatchNorm2d(width)
        self.conv2 = torch.nn.Conv2d(width, width, 3, second, dilation, dilation, bias=False)
        self.norm2 = torch.nn.BatchNorm2d(width)
        self.conv3 = torch.nn.Conv2d(width, 4 * width, 1, bias=False)
        self.norm3 = torch.nn.BatchNorm2d(4 * width)
        if stride != 1 or inputs != 4 * width:
            self.shortcut = torch.nn.Conv2d(inputs, 4 * width, 1, stride, bias=False)
            self.shortcut_norm = torch.nn.BatchNorm2d(4 * width)

    def forward(self, x):
        y = functional.relu(self.norm1(self.conv1(x)))
        y = functional.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        return functional.relu(y + (self.shortcut_norm(self.shortcut(x)) if hasattr(self, "shortcut") else x))


def _stage(blocks, inputs, width, stride, dilation, stride_in_1x1):
    stage = torch.nn.Sequential()
    for i in range(blocks):
        stage.add_module(f"block{i}", _Block(inputs, width, stride, dilation, stride_in_1x1))
        inputs, stride = 4 * width, 1
    return stage


class _Trunk(torch.nn.Module):
    def __init__(self, sizes, width, strides, stride_in_1x1):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.stem_norm = torch.nn.BatchNorm2d(width)
        self.res2 = _stage(sizes[0], width, width, strides[0], 1, stride_in_1x1)
        self.res3 = _stage(sizes[1], 4 * width, 2 * width, strides[1], 1, stride_in_1x1)
        self.res4 = _stage(sizes[2], 8 * width, 4 * width, strides[2], 1, stride_in_1x1)

    def forward(self, x):
        x = functional.max_pool2d(functional.relu(self.stem_norm(self.stem(x))), 3, 2, 1)
        return self.res4(self.res3(self.res2(x)))


def _randomise(module, seed):
    generator = torch.Generator().manual_seed(seed)
    module.double().eval()
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            positive = name.endswith(("running_var",)) or (tensor.dim() == 1 and name.endswith("weight"))
            tensor.copy_(noise.abs() + 0.5 if positive else noise * (0.3 if tensor.dim() == 1 else 0.1))


_NAMES = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}


def _params(module):
    """The same values under this project's names and layout (OIHW -> HWIO)."""
    params = {}
    for name, tensor in module.state_dict().items():
        *path, leaf = name.split(".")
        if leaf == "num_batches_tracked":
            continue
        at = params
        for part in path:
            at = at.setdefault(part, {})
        value = tensor.numpy()
        if value.ndim == 4:
            at["kernel"] = value.transpose(2, 3, 1, 0)
        else:
            at[_NAMES[leaf]] = value
    return params


def _compare(reference, module: nn.Module, shape, seed):
    _randomise(reference, seed)
    x = np.random.default_rng(seed).normal(size=shape)
    with torch.no_grad():
        expected = reference(torch.tensor(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
    with jax.enable_x64(True):
        found = np.asarray(jax.jit(module.apply)({"params": _params(reference)}, x))
    assert found.dtype == np.float64 and found.shape == expected.shape
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())


@pytest.mark.parametrize("strides, stride_in_1x1", [((1, 2, 2), False), ((1, 2, 1), True)])
def test_trunk(strides, stride_in_1x1):
    sizes, width = (1, 2, 1), 4
    ours = ResNetTrunk(sizes, width, strides, stride_in_1x1)
    _compare(_Trunk(sizes, width, strides, stride_in_1x1), ours, (2, 45, 38, 3), seed=0)


@pytest.mark.parametrize("stride, dilation", [(2, 1), (1, 2)])
def test_head_stage(stride, dilation):
    ours = ResidualStage(2, 4, stride, dilation)
    _compare(_stage(2, 8, 4, stride, dilation, False), ours, (3, 7, 7, 8), seed=1)


@pytest.mark.parametrize("caffe", [False, True])
@pytest.mark.parametrize("strides, stride_in_1x1", [((1, 2, 2), True), ((1, 2, 1), False)])
def test_a_picture_in_a_larger_canvas_gives_what_it_gives_alone(strides, stride_in_1x1, caffe):
    reference = _Trunk((2, 1, 1), 4, strides, stride_in_1x1)
    _randomise(reference, 2)
    trunk = ResNetTrunk((2, 1, 1), 4, strides, stride_in_1x1, caffe)
    rng = np.random.default_rng(2)
    pictures = [rng.normal(size=(*size, 3)) for size in ((45, 38), (61, 64), (33, 17))]
    canvas = rng.normal(size=(3, 64, 70, 3))  # what lies beyond a picture must not matter
    for row, picture in enumerate(pictures):
        canvas[row, : picture.shape[0], : picture.shape[1]] = picture
    sizes = np.array([picture.shape[:2] for picture in pictures])
    with jax.enable_x64(True):
        apply = jax.jit(lambda *args: trunk.apply({"params": _params(reference)}, *args))
        found = apply(canvas, sizes)
        cells = np.asarray(trunk.cells(sizes))
        for row, picture in enumerate(pictures):
            alone = np.asarray(apply(picture[None])[0])
            assert alone.shape[:2] == tuple(cells[row])
            np.testing.assert_allclose(found[row, : cells[row, 0], : cells[row, 1]], alone, rtol=0, atol=1e-9)
