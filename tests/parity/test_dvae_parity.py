"""The dVAE against the torch classes of the published one (PyPI package dall-e), random weights, float64."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
dall_e = pytest.importorskip("dall_e", reason="needs `pip install --no-deps dall-e attrs`")

from opt_jax.encoders.dvae import DiscreteVAE, map_pixels, unmap_pixels  # noqa: E402

MODEL = DiscreteVAE(vocab_size=512, group_count=4, n_hid=64, n_blk_per_group=2, n_init=16)


@pytest.fixture(autouse=True)
def float64(monkeypatch):
    def forward(self, x):  # the package's own forward, less its cast to float32
        return torch.nn.functional.conv2d(x, self.w, self.b, padding=(self.kw - 1) // 2)

    monkeypatch.setattr("dall_e.utils.Conv2d.forward", forward)
    with jax.enable_x64(True):
        yield


def randomised(module, seed):
    torch.manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            # biases too, and gains that let the residual paths count
            parameter.normal_(std=0.3 if name.endswith("b") else 2 / parameter[0].numel() ** 0.5)
    return module


def converted(module):
    """blocks.group_1.block_2.res_path.conv_3.w -> group_1_block_2/conv_3/kernel, OIHW -> HWIO."""
    params = {}
    for name, value in module.state_dict().items():
        parts = [part for part in name.split(".") if part not in ("blocks", "res_path")]
        if parts[0].startswith("group"):
            parts[:2] = [f"{parts[0]}_{parts[1]}"]
        layer = params.setdefault(parts[0], {})
        layer = layer if parts[0] in ("input", "output") else layer.setdefault(parts[1], {})
        value = value.numpy()
        layer.update({"kernel": value.transpose(2, 3, 1, 0)} if parts[-1] == "w" else {"bias": value})
    return params


def test_encoder():
    sizes = dict(n_hid=64, n_blk_per_group=2, vocab_size=512)
    reference = randomised(dall_e.Encoder(**sizes), 0)
    pixels = np.random.default_rng(0).uniform(0.1, 0.9, (2, 16, 24, 3))
    with torch.no_grad():
        expected = reference.blocks(torch.from_numpy(pixels.transpose(0, 3, 1, 2))).numpy()
    logits = MODEL.apply({"params": {"encoder": converted(reference)}}, pixels, method="logits")
    assert logits.shape == (2, 2, 3, 512) and logits.dtype == np.float64
    np.testing.assert_allclose(logits.transpose(0, 3, 1, 2), expected, rtol=0, atol=1e-9)


def test_decoder():
    sizes = dict(n_init=16, n_hid=64, n_blk_per_group=2, vocab_size=512)
    reference = randomised(dall_e.Decoder(**sizes), 1)
    codes = np.random.default_rng(1).dirichlet(np.full(512, 0.1), (2, 2, 3))
    with torch.no_grad():
        expected = reference.blocks(torch.from_numpy(codes.transpose(0, 3, 1, 2))).numpy()
    output = MODEL.apply({"params": {"decoder": converted(reference)}}, codes, method="reconstruct")
    assert output.shape == (2, 16, 24, 6)
    np.testing.assert_allclose(output.transpose(0, 3, 1, 2), expected, rtol=0, atol=1e-9)


def test_pixel_maps():
    pixels = np.linspace(0, 1, 48, dtype=np.float32).reshape(1, 3, 4, 4)
    mapped = dall_e.map_pixels(torch.from_numpy(pixels))
    np.testing.assert_allclose(map_pixels(pixels), mapped.numpy(), atol=1e-7)
    wide = np.linspace(-0.2, 1.2, 48, dtype=np.float32).reshape(1, 3, 4, 4)
    np.testing.assert_allclose(
        unmap_pixels(wide), dall_e.unmap_pixels(torch.from_numpy(wide)).numpy(), atol=1e-6
    )
