import math
import re

import numpy as np
import pytest

from opt_jax.evaluation.line_plot import HEIGHT, LEFT, RIGHT, WIDTH, line_plot, short_number, smoothed


def points(svg, style):
    text = re.search(f"class='{style}' points='([^']*)'", svg)[1]
    return np.array([[float(number) for number in point.split(",")] for point in text.split()])


def test_points_span_the_plot_and_higher_values_are_higher_up():
    drawn = points(line_plot([0, 5, 10], [3.0, 2.0, 1.0], name="loss"), "raw")
    np.testing.assert_allclose(drawn[:, 0], [LEFT, (LEFT + WIDTH - RIGHT) / 2, WIDTH - RIGHT])
    assert 0 < drawn[0, 1] < drawn[1, 1] < drawn[2, 1] < HEIGHT
    assert drawn[1, 1] - drawn[0, 1] == pytest.approx(drawn[2, 1] - drawn[1, 1], abs=0.2)


def test_a_logarithmic_axis_makes_decades_equal():
    drawn = points(line_plot([0, 1, 2], [1.0, 10.0, 100.0], name="norm", log=True), "raw")
    assert drawn[1, 1] - drawn[0, 1] == pytest.approx(drawn[2, 1] - drawn[1, 1], abs=0.2)


def test_non_finite_values_are_left_out_and_constants_drawn():
    assert len(points(line_plot([1, 2, 3], [1.0, math.nan, 1.0], name="x"), "raw")) == 2
    assert "no finite values" in line_plot([1], [math.inf], name="x")
    assert len(points(line_plot([1, 2], [0.0, 0.0], name="x"), "raw")) == 2


def test_long_curves_are_thinned_and_names_escaped():
    svg = line_plot(range(5000), np.zeros(5000), name="<b>", validation=([10], [0.5]))
    assert len(points(svg, "smooth")) == 240
    assert "<title>&lt;b&gt;</title>" in svg
    assert svg.count("<circle") == 1


def test_smoothing_is_the_mean_around_a_point():
    values = np.zeros(40)
    values[20] = 3.0
    np.testing.assert_allclose(smoothed(values)[18:23], [0, 1, 1, 1, 0], atol=1e-12)
    np.testing.assert_allclose(smoothed(np.full(7, 2.0)), 2.0)


def test_short_numbers():
    shown = [short_number(v) for v in (0.0, 0.00001234, 0.5, 45.678, 7500.0, 3.21e6, math.nan)]
    assert shown == ["0", "1.23e-5", "0.5", "45.7", "7.5k", "3.21M", "–"]
