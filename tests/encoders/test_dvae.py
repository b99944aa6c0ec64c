import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from opt_jax.configuration import load
from opt_jax.data.triplet import SourceError, Triplet
from opt_jax.encoders.dvae import (
    DiscreteVAE,
    decode,
    encode,
    from_patches,
    map_pixels,
    model_of,
    to_patches,
    unmap_pixels,
)
from opt_jax.encoders.dvae_objectives import (
    dvae_task,
    kl_to_uniform,
    kl_weight,
    logit_laplace_log_density,
    relaxed_codes,
    temperature,
)
from opt_jax.encoders.dvae_pictures import PictureBatches, fit_square, write_before_after
from opt_jax.encoders.dvae_start import k_means, standardised, with_codebook
from opt_jax.encoders.dvae_training import evaluate_dvae, train_dvae
from opt_jax.encoders.frozen import load_frozen

OBJECTIVE = ConfigDict(
    dict(
        temperature_end=0.0625,
        temperature_steps=100,
        kl_weight=2.0,
        kl_ramp_steps=10,
        min_log_scale=-3.0,
        logit_error_weight=0.0,
    )
)
SIZES = dict(
    vocab_size=12, group_count=2, n_hid=8, n_blk_per_group=1, n_init=6, patch_size=2, input_width=3
)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), np.uint8)


@pytest.fixture(scope="module")
def params(images):
    task = dvae_task(DiscreteVAE(**SIZES), OBJECTIVE)
    return jax.jit(task.init)(jax.random.key(0), {"images": images[:1]})


def test_sizes_are_read_off_the_parameters(params):
    assert model_of(params) == DiscreteVAE(**SIZES)
    with pytest.raises(ValueError, match="not the parameters of a dVAE"):
        model_of({"encoder": {}, "decoder": {}})


@pytest.mark.parametrize("variant, grid", [("tiny", 8), ("published", 32)])
def test_shapes_of_every_config(variant, grid):
    config = load("configs/encoders/dvae.py", variant)
    model = DiscreteVAE(**config.model)
    pixels = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, 3), jnp.float32)
    relax = jax.nn.softmax
    params = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, relax)["params"], pixels)
    logits, output = jax.eval_shape(lambda p, x: model.apply({"params": p}, x, relax), params, pixels)
    assert logits.shape == (1, grid, grid, config.model.vocab_size)
    assert output.shape == (1, config.image_size, config.image_size, 6)
    assert config.image_size // model.cell == grid and model_of(params) == model


def test_patches_are_pixels_in_their_places():
    x = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    patches = to_patches(x, 2)
    np.testing.assert_array_equal(patches[1, 0, 2].reshape(2, 2, 3), x[1, 0:2, 4:6])
    np.testing.assert_array_equal(from_patches(patches, 2), x)


def test_logit_laplace_density_against_its_formula_and_integral():
    x, mu, b = 0.3, 0.4, 0.7
    by_hand = math.exp(-abs(math.log(x / (1 - x)) - mu) / b) / (2 * b * x * (1 - x))
    got = logit_laplace_log_density(jnp.float32(x), mu, math.log(b))
    assert math.isclose(float(got), math.log(by_hand), rel_tol=1e-5)
    grid = (np.arange(200_000) + 0.5) / 200_000
    density = np.exp(np.asarray(logit_laplace_log_density(jnp.asarray(grid, jnp.float32), mu, math.log(b))))
    assert abs(density.mean() - 1) < 1e-3


def test_kl_to_uniform():
    assert abs(float(kl_to_uniform(jnp.full(5, 3.0)))) < 1e-6
    assert math.isclose(float(kl_to_uniform(jnp.array([50.0, 0, 0, 0]))), math.log(4), rel_tol=1e-5)
    p = np.array([0.5, 0.25, 0.125, 0.125])
    expected = np.sum(p * np.log(p * 4))
    assert math.isclose(float(kl_to_uniform(jnp.log(p))), expected, rel_tol=1e-5)


def test_gumbel_samples_follow_the_logits():
    logits = jnp.broadcast_to(jnp.log(jnp.array([0.6, 0.3, 0.1])), (20_000, 3))
    samples = np.asarray(relaxed_codes(jax.random.key(0), logits, 1 / 16))
    np.testing.assert_allclose(samples.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.bincount(samples.argmax(-1)) / 20_000, [0.6, 0.3, 0.1], atol=0.015)
    assert samples.max(-1).mean() > 0.97


def test_schedules():
    assert float(temperature(0, OBJECTIVE)) == 1
    assert math.isclose(float(temperature(50, OBJECTIVE)), (1 + 0.0625) / 2, rel_tol=1e-6)
    assert math.isclose(float(temperature(500, OBJECTIVE)), 0.0625, rel_tol=1e-6)
    assert [float(kl_weight(step, OBJECTIVE)) for step in (0, 5, 10, 99)] == [0, 1, 2, 2]


def test_losses_are_sums_over_rows_and_reach_both_halves(params, images):
    task = dvae_task(DiscreteVAE(**SIZES), OBJECTIVE)
    batch = {"images": images[:4]}

    @jax.jit
    def losses_and_gradient(params, batch):
        losses = task.losses(params, batch, jax.random.key(1), jnp.int32(20))
        gradient = jax.grad(
            lambda p: sum(task.losses(p, batch, jax.random.key(1), jnp.int32(20))[n][0] for n in task.weights)
        )(params)
        return losses, gradient

    losses, gradient = losses_and_gradient(params, batch)
    assert all(float(count) == 4 for _, count in losses.values())
    for half in ("encoder", "decoder"):
        for path, leaf in jax.tree_util.tree_flatten_with_path(gradient[half])[0]:
            assert np.abs(leaf).max() > 0, (half, path)
    # the KL term by hand: weight 2 at step 20, over 8 * 8 * 3 values
    logits = DiscreteVAE(**SIZES).apply({"params": params}, map_pixels(images[:4] / 255.0), method="logits")
    expected = 2 / 192 * float(kl_to_uniform(logits).sum())
    assert math.isclose(float(losses["kl"][0]), expected, rel_tol=1e-4)


def test_codes_are_hard_and_independent_of_the_batch(params, images):
    codes = encode(params, images)
    assert codes.dtype == np.int32 and codes.shape == (30, 4)
    logits = DiscreteVAE(**SIZES).apply({"params": params}, map_pixels(images / 255.0), method="logits")
    np.testing.assert_array_equal(codes, np.asarray(logits).argmax(-1).reshape(30, 4))
    np.testing.assert_array_equal(encode(params, images[::-1])[::-1], codes)
    np.testing.assert_array_equal(encode(params, images[7:8])[0], codes[7])
    pictures = decode(params, codes)
    assert pictures.dtype == np.uint8 and pictures.shape == images.shape
    np.testing.assert_array_equal(decode(params, codes[7:8])[0], pictures[7])
    assert encode(params, images[:0]).shape == (0, 4)


def test_decode_is_the_mean_of_the_decoder(params):
    codes = np.array([[0, 3, 11, 5]])
    model = DiscreteVAE(**SIZES)
    one_hot = np.eye(12, dtype=np.float32)[codes].reshape(1, 2, 2, 12)
    mean = model.apply({"params": params}, one_hot, method="reconstruct")[..., :3]
    expected = np.round(255 * np.asarray(unmap_pixels(1 / (1 + np.exp(-mean)))))
    np.testing.assert_allclose(decode(params, codes).astype(float), expected, atol=1)


def test_wrong_input_is_named(params, images):
    with pytest.raises(ValueError, match="uint8.*float32"):
        encode(params, images.astype(np.float32))
    with pytest.raises(ValueError, match="8x6 pixels.*multiples of 4"):
        encode(params, images[:, :, :6])
    with pytest.raises(ValueError, match="square"):
        decode(params, np.zeros((1, 3), np.int32))
    with pytest.raises(ValueError, match="12"):
        decode(params, np.full((1, 4), 12))


def test_a_picture_is_letterboxed_and_averaged():
    wide = np.full((2, 4, 3), 200, np.uint8)
    wide[0, 0] = 100
    expected = np.full((2, 2, 3), 127, np.uint8)
    expected[0] = [[175] * 3, [200] * 3]  # (100 + 3 * 200) / 4
    np.testing.assert_array_equal(fit_square(wide, 2)[0:1], expected[0:1])
    np.testing.assert_array_equal(fit_square(wide, 2)[1], expected[1])
    tall = fit_square(np.full((8, 4, 3), 9, np.uint8), 8)
    assert (tall[:, 2:6] == 9).all() and (tall[:, :2] == 127).all() and (tall[:, 6:] == 127).all()
    assert fit_square(np.full((2, 2, 3), 9, np.uint8), 8).shape == (8, 8, 3)


def test_k_means_finds_separate_clusters():
    rng = np.random.default_rng(0)
    truth = np.array([[0, 0], [10, 0], [0, 10]])
    points = np.concatenate([c + 0.1 * rng.normal(size=(20, 2)) for c in truth])
    centres = k_means(points, 3, np.random.default_rng(1))
    nearest = np.abs(centres[:, None] - truth).max(-1).min(0)
    assert nearest.max() < 0.2
    with pytest.raises(ValueError, match="2 points cannot make 3 clusters"):
        k_means(points[:2], 3, rng)


def test_standardised_input_and_output(params, images):
    started = standardised(params, images)
    model = DiscreteVAE(**SIZES)
    pixels = map_pixels(images.astype(np.float64) / 255)
    patches = np.asarray(pixels).reshape(30, 4, 2, 4, 2, 3).swapaxes(2, 3).reshape(30, 4, 4, 12)
    deviation = np.tile(np.asarray(pixels).std((0, 1, 2)), 4)
    mean = np.tile(np.asarray(pixels).mean((0, 1, 2)), 4)
    normal = (patches - mean) / deviation
    kernel = np.asarray(params["encoder"]["input"]["kernel"])
    inner = np.einsum("nhwabi,abio->nhwo", np.lib.stride_tricks.sliding_window_view(
        normal, (3, 3), (1, 2)).transpose(0, 1, 2, 4, 5, 3), kernel)
    first = started["encoder"]["input"]
    found = jax.lax.conv_general_dilated(
        patches.astype(np.float32), first["kernel"], (1, 1), "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC")) + first["bias"]
    np.testing.assert_allclose(found, inner, atol=1e-3)
    bias = started["decoder"]["output"]["bias"].reshape(4, 6)
    logits = np.log(pixels / (1 - pixels))
    np.testing.assert_allclose(bias[2, :3], np.median(logits, (0, 1, 2)), rtol=1e-4)
    assert model_of(started) == model


def test_codebook_gives_each_cell_its_nearest_cluster(params, images):
    started = with_codebook(params, images, seed=0)
    model, pixels = DiscreteVAE(**SIZES), map_pixels(images / 255.0)
    before = model.apply({"params": params}, pixels, method="logits")
    points = np.asarray(before).reshape(-1, 12) @ np.asarray(params["decoder"]["input"]["kernel"])[0, 0]
    centres = started["decoder"]["input"]["kernel"][0, 0]
    nearest = ((points[:, None] - centres) ** 2).sum(-1).argmin(1)
    codes = encode(started, images).ravel()
    assert (codes == nearest).mean() > 0.98  # ties within float32
    assert len(set(codes)) == 12


class Stripes:
    """Pictures of one of four colours in one half, white in the other."""

    class_names = ("stripe",)
    colours = np.array([[220, 30, 30], [30, 160, 40], [30, 60, 220], [20, 20, 20]], np.uint8)

    def __len__(self):
        return 32

    def read(self, index, image=True, audio=True):
        image = np.full((16, 16, 3), 240, np.uint8)
        image[:, 8 * (index // 4 % 2) :][:, :8] = self.colours[index % 4]
        return Triplet(id=str(index), image=image)

    def rows_with(self, *parts):
        return np.arange(32)

    def caption(self, index):
        return None

    def fingerprint(self):
        return {"name": "stripes"}


class WithoutPictures(Stripes):
    def read(self, index, image=True, audio=True):
        return Triplet(id=str(index), caption="a stripe")


def test_batches_are_a_function_of_the_step():
    batches = PictureBatches(Stripes(), 8, 8, seed=3)
    stream = batches.from_step(0)
    first = [next(stream)["images"] for _ in range(6)]
    assert first[0].shape == (8, 8, 8, 3) and first[0].dtype == np.uint8
    again = PictureBatches(Stripes(), 8, 8, seed=3).from_step(5)
    np.testing.assert_array_equal(next(again)["images"], first[5])
    assert not np.array_equal(first[0], first[4])  # another epoch, another order


def test_training_learns_to_reconstruct_and_freezes(tmp_path):
    fast = dict(batch_size=8, learning_rate=3e-3, decay="cosine", weight_decay=0.0, log_every=50)
    fast["mesh"] = dict(data=1, fsdp=1, tensor=1)
    config = ConfigDict(
        dict(
            image_size=8,
            model=SIZES,
            start=dict(pictures=16, train=dict(steps=150, **fast)),
            objective=OBJECTIVE.to_dict() | dict(logit_error_weight=10.0, kl_weight=1.0),
            train=dict(steps=50, **fast),
        )
    )
    with pytest.raises(SourceError, match="no sample of the validation split has a picture"):
        train_dvae(config, Stripes(), WithoutPictures(), tmp_path, seed=0)
    assert not list(tmp_path.iterdir())  # that was told before anything was trained
    metrics = train_dvae(config, Stripes(), Stripes(), tmp_path, seed=0)
    assert metrics["psnr"] > 16  # one colour everywhere: 8 dB
    params, frozen = load_frozen(tmp_path)
    assert frozen == {**SIZES, "image_size": 8, "code_grid": [2, 2]}
    images = np.stack([fit_square(Stripes().read(i).image, 8) for i in range(32)])
    scores, after = evaluate_dvae(params, images)
    assert scores == metrics and after.shape == images.shape
    codes = encode(params, images)
    used = np.bincount(codes.ravel(), minlength=12)
    assert metrics["dead_codes"] == (used == 0).sum()
    assert Image.open(tmp_path / "before_after.png").size == (8 * 8 * 2, 8 * 8 * 2)


def test_before_after_sheet(tmp_path):
    before = np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1) * np.ones((1, 4, 4, 3), np.uint8)
    write_before_after(tmp_path / "sheet.png", before, before + 100, columns=2, zoom=1)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (16, 8, 3)
    assert [int(sheet[row, 0, 0]) for row in (0, 4, 8, 12)] == [0, 100, 2, 102]
    assert sheet[0, 4, 0] == 1 and sheet[12, 4, 0] == 0
