from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opt_jax.encoders import boxes as box_ops
from opt_jax.encoders.faster_rcnn_pooling import roi_align, roi_pool


def _random_boxes(rng, count, side=20.0):
    low = rng.uniform(0, side * 0.7, (count, 2))
    return np.concatenate([low, low + rng.uniform(1, side * 0.5, (count, 2))], axis=1).astype(np.float32)


def _overlap(a, b):
    """Two boxes, from the definition, in float64."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    return width * height / (areas[0] + areas[1] - width * height)


def _greedy(boxes, scores, threshold, valid):
    """Suppression as it is usually written: a list of kept boxes, the best first."""
    kept = []
    for i in sorted(np.flatnonzero(valid), key=lambda i: (-scores[i], i)):
        if all(_overlap(boxes[i], boxes[j]) <= threshold for j in kept):
            kept.append(i)
    mask = np.zeros(len(boxes), bool)
    mask[kept] = True
    return mask


def test_iou_by_hand():
    first = jnp.array([[0.0, 0, 4, 2], [0, 0, 0, 0]])
    second = jnp.array([[2.0, 0, 6, 2], [0, 0, 4, 2], [5, 5, 6, 6], [0, 0, 0, 0]])
    expected = [[4 / 12, 1, 0, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(box_ops.iou(first, second), expected, rtol=1e-6)


def test_codes_by_hand_and_back():
    anchor, box = jnp.array([10.0, 10, 30, 20]), jnp.array([15.0, 12, 55, 22])
    # Centres (20, 15) and (35, 17), sides (20, 10) and (40, 10).
    expected = [10 * 15 / 20, 10 * 2 / 10, 5 * np.log(2), 0]
    weights = (10.0, 10.0, 5.0, 5.0)
    code = box_ops.encode_boxes(box, anchor, weights)
    np.testing.assert_allclose(code, expected, rtol=1e-6)
    np.testing.assert_allclose(box_ops.decode_boxes(code, anchor, weights), box, rtol=1e-6)


def test_decoding_bounds_the_scale():
    box = box_ops.decode_boxes(jnp.array([0.0, 0, 100, 100]), jnp.array([0.0, 0, 16, 16]))
    np.testing.assert_allclose(box, [8 - 500, 8 - 500, 8 + 500, 8 + 500], rtol=1e-5)


def test_clipping_uses_height_for_y():
    clipped = box_ops.clip_boxes(jnp.array([[-5.0, -5, 50, 50]]), jnp.array([10, 20]))
    np.testing.assert_array_equal(clipped, [[0, 0, 20, 10]])


def test_anchor_order_and_shape():
    anchors = box_ops.anchor_grid(2, 3, 8, sizes=(4.0, 8.0), ratios=(1.0, 4.0))
    assert anchors.shape == (2 * 3 * 4, 4)
    np.testing.assert_allclose(anchors[0], [2, 2, 6, 6])  # cell (0, 0): centre (4, 4)
    np.testing.assert_allclose(anchors[1], [3, 0, 5, 8])  # ratio 4: twice as high, half as wide
    np.testing.assert_allclose(anchors[4], [10, 2, 14, 6])  # then to the right


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.7])
def test_suppression_is_the_greedy_one(threshold):
    rng = np.random.default_rng(0)
    boxes = np.stack([_random_boxes(rng, 40) for _ in range(6)])
    scores = np.round(rng.uniform(size=(6, 40)), 1).astype(np.float32)  # many ties
    valid = rng.uniform(size=(6, 40)) < 0.8
    valid[5] = False
    found = jax.jit(jax.vmap(lambda b, s, v: box_ops.nms(b, s, threshold, v)))(boxes, scores, valid)
    expected = [_greedy(*row[:2], threshold, row[2]) for row in zip(boxes, scores, valid, strict=True)]
    np.testing.assert_array_equal(found, expected)


def test_suppression_of_a_chain():
    # Each covers its neighbours only, so every second one stays: the case that needs many rounds.
    x = np.arange(12.0)[:, None]
    boxes = np.concatenate([x, 0 * x, x + 2, 0 * x + 1], axis=1)
    kept = jax.jit(box_ops.nms)(boxes, -jnp.arange(12.0), 0.3, jnp.ones(12, bool))
    np.testing.assert_array_equal(kept, np.arange(12) % 2 == 0)


def _bilinear(image, y, x):
    """Value of one channel at (y, x); 0 more than a cell outside, the border's value within it."""
    height, width = image.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return 0.0
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = int(np.floor(y)), int(np.floor(x))
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    dy, dx = y - top, x - left
    upper = image[top, left] * (1 - dx) + image[top, right] * dx
    lower = image[bottom, left] * (1 - dx) + image[bottom, right] * dx
    return upper * (1 - dy) + lower * dy


def _align_loops(features, boxes, stride, bins, ratio, aligned):
    out = np.zeros((len(boxes), bins, bins, features.shape[-1]))
    for r, box in enumerate(boxes.astype(np.float64)):
        x1, y1, x2, y2 = box / stride - (0.5 if aligned else 0)
        sides = np.array([y2 - y1, x2 - x1])
        step = (sides if aligned else np.maximum(sides, 1)) / bins
        ny, nx = (ratio, ratio) if ratio else np.maximum(np.ceil(step), 1).astype(int)
        for p, q, c in np.ndindex(bins, bins, features.shape[-1]):
            rows = [y1 + (p + (i + 0.5) / ny) * step[0] for i in range(ny)]
            columns = [x1 + (q + (j + 0.5) / nx) * step[1] for j in range(nx)]
            out[r, p, q, c] = np.mean([_bilinear(features[..., c], y, x) for y in rows for x in columns])
    return out


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [0, 2])
def test_roi_align_against_loops(aligned, ratio):
    rng = np.random.default_rng(1)
    features = rng.normal(size=(7, 9, 2))
    boxes = np.array([[3, 5, 60, 50], [0, 0, 72, 56], [10, 10, 12, 13], [-20, -9, 30, 80]], np.float32)
    single = features.astype(np.float32)
    cut = jax.jit(partial(roi_align, stride=8, bins=3, sampling_ratio=ratio, aligned=aligned))
    found = cut(single, boxes)
    np.testing.assert_allclose(found, _align_loops(features, boxes, 8, 3, ratio, aligned), atol=2e-5)


def test_roi_align_of_a_ramp():
    # Bilinear interpolation is exact on a plane: a bin's value is the plane at the bin's centre.
    y, x = np.meshgrid(np.arange(16.0), np.arange(16.0), indexing="ij")
    ramp = jnp.array((10 * y + x)[..., None], jnp.float32)
    box = jnp.array([[8.0, 16, 24, 32]])  # rows 4..8, columns 2..6 in cells of 4 pixels, less half a cell
    found = roi_align(ramp, box, stride=4, bins=2, aligned=True)[0, ..., 0]
    np.testing.assert_allclose(found, [[45 + 2.5, 45 + 4.5], [65 + 2.5, 65 + 4.5]], rtol=1e-6)


def test_roi_pool_against_loops():
    rng = np.random.default_rng(2)
    features = rng.normal(size=(6, 8, 3)).astype(np.float32)
    boxes = np.array([[0, 0, 127, 95], [20, 37, 90, 60], [30, 30, 33, 33], [100, 70, 150, 130]], np.float32)
    bins, stride = 3, 16
    expected = np.zeros((4, bins, bins, 3), np.float32)
    for r, box in enumerate(boxes):
        x1, y1, x2, y2 = (int(np.floor(v / stride + 0.5)) for v in box)
        height, width = max(y2 - y1 + 1, 1), max(x2 - x1 + 1, 1)
        for p, q in np.ndindex(bins, bins):
            rows = [y for y in range(6) if y1 + p * height // bins <= y < y1 + -(-(p + 1) * height // bins)]
            columns = [x for x in range(8) if x1 + q * width // bins <= x < x1 + -(-(q + 1) * width // bins)]
            if rows and columns:
                expected[r, p, q] = features[np.ix_(rows, columns)].max((0, 1))
    found = jax.jit(partial(roi_pool, stride=stride, bins=bins))(features, boxes)
    np.testing.assert_array_equal(found, expected)
    assert np.any(expected == 0)  # a bin beyond the border is empty


def test_roi_pool_divides_as_the_published_code_does():
    # In float32 6 / 14 * 7 is 3, but 6 * (1 / 14) * 7, which a compiler makes of it, is more.
    features = np.arange(8, dtype=np.float32)[None, :, None].repeat(8, 0)
    box = np.array([[16, 16, 96, 96]], np.float32)  # cells 1 to 6
    found = jax.jit(partial(roi_pool, stride=16, bins=14))(features, box)
    ends = np.ceil(np.arange(1, 15, dtype=np.float32) * (np.float32(6) / np.float32(14)))
    np.testing.assert_array_equal(found[0, 0, :, 0], ends)  # the last of a bin's cells, counted from 1
    assert ends[6] == 3
