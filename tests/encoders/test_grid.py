"""Cells of the dVAE's last map as regions: where they lie, and that they belong to the picture alone."""

import jax
import numpy as np
import pytest

from opt_jax.encoders import dvae, grid
from opt_jax.encoders.dvae_pictures import fit_square


@pytest.fixture(scope="module")
def params():
    model = dvae.DiscreteVAE(16, group_count=2, n_hid=8, n_blk_per_group=1, n_init=4, patch_size=4)
    pixels = np.zeros((1, 32, 32, 3), np.float32)
    return jax.jit(lambda key: model.init(key, pixels, lambda x: x)["params"])(jax.random.key(0))


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def test_cells_of_a_square_picture_tile_it(params):
    (found,) = grid.grid_regions(params, [picture(32, 32)], 32, 1)
    boxes = found["region_boxes"]
    assert boxes.shape == (16, 7) and found["region_features"].shape == (16, grid.feature_size(params, 1))
    np.testing.assert_allclose(boxes[5], [0.25, 0.25, 0.5, 0.5, 0.25, 0.25, 0.0625])
    assert boxes[:, 6].sum() == pytest.approx(1)
    assert (found["region_classes"] == 1).all()


def test_bars_beside_a_wide_picture_are_no_regions(params):
    image = picture(30, 60)  # 16 x 32 pixels in the square: the middle two rows of cells
    (found,) = grid.grid_regions(params, [image], 32, 1)
    assert len(found["region_boxes"]) == 8
    np.testing.assert_allclose(found["region_boxes"][0, :4], [0, 0, 0.25, 0.5])
    whole = dvae.features(params, fit_square(image, 32)[None])[0]
    np.testing.assert_array_equal(found["region_features"], whole[1:3].reshape(8, -1))


def test_a_cell_that_a_picture_fills_in_part_ends_at_its_edge(params):
    (found,) = grid.grid_regions(params, [picture(24, 64)], 32, 1)  # 12 of 32 pixels high, from 10 to 22
    boxes = found["region_boxes"]
    assert len(boxes) == 8 and boxes[:, [1, 3]].min() == 0 and boxes[:, [1, 3]].max() == 1
    np.testing.assert_allclose(boxes[0, 3], 6 / 12)


def test_features_do_not_depend_on_the_batch(params):
    images = [picture(32, 32, seed) for seed in range(3)] + [picture(20, 60, 9)]
    together = grid.grid_regions(params, images, 32, 1)
    for image, found in zip(images, together, strict=True):
        (alone,) = grid.grid_regions(params, [image], 32, 1)
        np.testing.assert_array_equal(found["region_features"], alone["region_features"])
    logits = np.einsum(
        "nc,cv->nv", together[0]["region_features"], params["encoder"]["output"]["kernel"][0, 0]
    )
    codes = (logits + params["encoder"]["output"]["bias"]).argmax(1)
    np.testing.assert_array_equal(codes, dvae.encode(params, images[0][None])[0])


def test_a_window_holds_the_cells_around(params):
    image = picture(32, 32)
    (single,), (wide,) = (grid.grid_regions(params, [image], 32, window) for window in (1, 3))
    size = grid.feature_size(params, 1)
    assert wide["region_features"].shape == (16, 9 * size) and grid.feature_size(params, 3) == 9 * size
    around = wide["region_features"].reshape(4, 4, 9, size)
    cells = single["region_features"].reshape(4, 4, size)
    np.testing.assert_array_equal(around[1, 2], cells[0:3, 1:4].reshape(9, size))
    np.testing.assert_array_equal(around[:, :, 4], cells)
    assert not around[0, :, :3].any() and not around[:, 3, 2::3].any()
    np.testing.assert_array_equal(wide["region_boxes"], single["region_boxes"])
