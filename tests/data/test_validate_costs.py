"""What a feature cache is said to cost, by hand, and against runs that were measured."""

import numpy as np
import pytest

from opt_jax.data.triplet import Regions, Triplet
from opt_jax.data.validate_costs import costs, grid_share
from opt_jax.data.validate_tally import OTHERS, Counts, Place, Tally


def test_costs_by_hand_and_against_a_run():
    image = np.zeros((8, 8, 3), np.uint8)
    tally = Tally()
    spoken = Triplet("a", image, "ab", np.zeros(30 * 16_000, np.float32), references=("ab",))
    tally.add(spoken, (), Place("train", "x", 0, 0))
    small, grid, published = costs(tally)
    assert small["bytes"] == 350 + 4 + 64 * 4 + 10 * (256 + 36) + 5.12 * 50 * 256
    assert published["bytes"] == 350 + 4 + 1024 * 4 + 36 * (4096 + 36) + 30 * 50 * 1536
    assert published["seconds"] == pytest.approx(7.2 + 2.6 + 30 * 56 / 600)
    regions = Regions(np.zeros((5, 2048), np.float32), np.zeros((5, 4)), np.ones(5), np.ones(5), 640, 480)
    tally = Tally()
    tally.add(Triplet("b", regions=regions), (), Place("train", "x", 0, 0))
    assert tally.parts == {"image": 1}
    assert costs(tally)[2]["bytes"] == 350 + 5 * (4096 + 36) and costs(tally)[2]["seconds"] == 0
    # 9,000 rows of Spoken Scenes take 113 s with the small encoders.
    tally = Tally()
    tally.pixels.counts[5], tally.within[5.12] = 9000, 9000 * 2.6
    assert costs(tally)[0]["seconds"] == pytest.approx(113, rel=0.05)
    # 1,500 rows of spoken digits with three copies each, and 300 without: 607.6 MB in 118.4 s with the grid.
    tally = Tally()
    tally.rows["train", "x", True], tally.sizes["128 x 64"], tally.text = 1800, 1800, 1800 * 14
    tally.pixels.counts[5], tally.within[5.12] = 1800, 2915
    estimate = costs(tally, copied=1500 / 1800)[1]
    assert estimate["bytes"] == pytest.approx(607.6e6, rel=0.02)
    assert estimate["seconds"] == pytest.approx(118.4, rel=0.05)
    assert "with 3 copies of training rows with captions" in estimate["assumption"]


@pytest.mark.parametrize("width, height", [(8, 8), (128, 64), (100, 30), (30, 100), (641, 427), (2000, 9)])
def test_cells_of_a_picture_are_those_that_the_grid_keeps(monkeypatch, width, height):
    from opt_jax.encoders import grid

    monkeypatch.setattr(grid.dvae, "features", lambda params, images: np.zeros((len(images), 8, 8, 4)))
    (found,) = grid.grid_regions(None, [np.zeros((height, width, 3), np.uint8)], 64, 3)
    tally = Tally(sizes=Counts({f"{width} x {height}": 3, OTHERS: 7}))
    assert len(found["region_boxes"]) == 64 * grid_share(tally)
