from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs.encoders.detector import get_config
from opt_jax.data.triplet import Triplet
from opt_jax.encoders.faster_rcnn import detect, from_config, select_regions
from opt_jax.encoders.faster_rcnn_metrics import Regions, average_precision, recall_and_class_accuracy
from opt_jax.encoders.faster_rcnn_objectives import (
    Sampling,
    anchor_targets,
    region_targets,
    sample,
    smooth_l1,
)
from opt_jax.encoders.faster_rcnn_pictures import DetectorBatches, in_corner, resized
from opt_jax.encoders.faster_rcnn_training import calibrated_params, train_detector
from opt_jax.encoders.frozen import load_frozen

_SIDE = 32
_COLOURS = ((220, 30, 30), (30, 60, 220))


def _config() -> ConfigDict:
    config = get_config("tiny")
    config.max_objects = 2
    config.model.update(
        min_side=_SIDE,
        max_side=_SIDE,
        num_classes=2,
        width=8,
        head_width=8,
        rpn_width=16,
        anchor_sizes=(12.0,),
        pooled_size=4,
        proposals=12,
        proposals_before_nms=16,
        max_regions=4,
        min_regions=1,
    )
    config.sampling.update(anchors=16, regions=10)
    config.train.update(steps=150, batch_size=8, warmup_steps=5, learning_rate=5e-3, log_every=30)
    config.train.mesh = dict(data=1, fsdp=1, tensor=1)
    return config


class _Rectangles:
    """One or two rectangles, red (class 1) or blue (class 2), on a light ground."""

    class_names = ["red", "blue"]

    def __init__(self, count, seed):
        self._count, self._seed = count, seed

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        rng = np.random.default_rng((self._seed, index))
        image = rng.integers(215, 235, (_SIDE, _SIDE, 3)).astype(np.uint8)
        boxes, classes = [], []
        for half in range(int(rng.integers(1, 3))):  # left and right half: they do not touch
            x, y = half * 16 + rng.integers(1, 4), rng.integers(1, 18)
            width, height = rng.integers(9, 13, 2)
            classes.append(int(rng.integers(1, 3)))
            image[y : y + height, x : x + width] = _COLOURS[classes[-1] - 1]
            boxes.append((x, y, x + width, y + height))
        boxes, classes = np.array(boxes, np.float32), np.array(classes, np.int32)
        return Triplet(id=f"rectangles-{index}", image=image, boxes=boxes, classes=classes)

    def fingerprint(self):
        return {"rectangles": self._count, "seed": self._seed}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("detector")
    metrics = train_detector(_config(), _Rectangles(64, 0), _Rectangles(24, 1), directory, seed=0)
    return directory, metrics


def test_training_finds_rectangles_and_freezes(trained):
    directory, metrics = trained
    assert metrics["ap50"] > 0.7, metrics
    assert metrics["class_accuracy"] > 0.9, metrics
    params, config = load_frozen(directory)
    images = np.stack([_Rectangles(3, 1)[i].image for i in range(3)])
    regions = jax.device_get(detect(params, images, config))
    assert regions["features"].shape == (3, 4, 32) and regions["boxes"].shape == (3, 4, 4)
    assert regions["valid"][:, 0].all()
    for row in range(3):
        objects, valid = _Rectangles(3, 1)[row], regions["valid"][row]
        assert np.all((regions["classes"][row] > 0) == valid)
        assert not regions["features"][row][~valid].any() and not regions["boxes"][row][~valid].any()
        assert np.all(np.diff(regions["scores"][row]) <= 0)
        assert regions["classes"][row, 0] in objects.classes


def test_a_picture_does_not_depend_on_its_neighbours(trained):
    params, config = load_frozen(trained[0])
    source = _Rectangles(8, 1)
    first = detect(params, np.stack([source[i].image for i in (0, 1, 2)]), config)
    second = detect(params, np.stack([source[i].image for i in (0, 5, 7)]), config)
    assert not np.array_equal(first["features"][1], second["features"][1])
    for name in first:
        np.testing.assert_array_equal(first[name][0], second[name][0])


def test_frozen_statistics_get_no_gradient_and_stay(trained):
    params, _ = load_frozen(trained[0])
    config = _config()
    batch = next(DetectorBatches(_Rectangles(64, 0), 8, (_SIDE, _SIDE, 2), seed=0).from_step(0))
    start = calibrated_params(config, batch, seed=0)
    for name in ("mean", "var"):
        np.testing.assert_array_equal(params["trunk"]["stem_norm"][name], start["trunk"]["stem_norm"][name])
    assert np.abs(params["trunk"]["stem_norm"]["scale"] - 1).max() > 1e-3


def test_calibration_normalises_layer_after_layer():
    config = _config()
    batch = next(DetectorBatches(_Rectangles(8, 0), 8, (_SIDE, _SIDE, 2), seed=0).from_step(0))
    params = calibrated_params(config, batch, seed=0)
    model = from_config(config.model)
    variables = {"params": params}
    forward = jax.jit(partial(model.apply, capture_intermediates=True))
    _, inner = forward(variables, batch["images"], batch["boxes"])
    trunk, head = inner["intermediates"]["trunk"], inner["intermediates"]["head"]
    for norm in (trunk["stem_norm"], trunk["res4"]["block0"]["norm3"], head["block0"]["norm2"]):
        (output,) = norm["__call__"]
        np.testing.assert_allclose(output.mean((0, 1, 2)), 0, atol=1e-3)
        np.testing.assert_allclose(output.std((0, 1, 2)), 1, atol=2e-2)


def _selection(**changes):
    """Four proposals, two classes; 0 and 1 overlap strongly, 3 is padding."""
    config = _config()
    config.model.update(refine_boxes=False, nms_threshold=0.5, max_regions=3, **changes)
    proposals = jnp.array([[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30], [0, 0, 0, 0]])
    probabilities = jnp.array([[0.05, 0.9, 0.05], [0.1, 0.6, 0.3], [0.9, 0.02, 0.08], [0, 1, 0]])
    model = from_config(config.model)
    valid = jnp.array([True, True, True, False])
    logits, deltas = jnp.log(probabilities), jnp.zeros((4, 2, 4))
    return jax.jit(partial(select_regions, model))(proposals, valid, logits, deltas, jnp.array([32, 32]))


def test_selection_by_hand():
    # Class 1: box 0 suppresses box 1. Class 2: box 1 (0.3) goes before box 0. Scores: 0.9, 0.3, 0.08.
    found = _selection(confidence_threshold=0.2, min_regions=1)
    np.testing.assert_array_equal(found["index"][:2], [0, 1])
    np.testing.assert_array_equal(found["valid"], [True, True, False])
    np.testing.assert_array_equal(found["classes"], [1, 1, 0])  # the most probable class, also of box 1
    np.testing.assert_allclose(found["scores"], [0.9, 0.3, 0], rtol=1e-5)


def test_selection_keeps_a_minimum_but_no_padding():
    found = _selection(confidence_threshold=0.95, min_regions=2)
    np.testing.assert_array_equal(found["valid"], [True, True, False])
    found = _selection(confidence_threshold=0.95, min_regions=3)
    np.testing.assert_array_equal(found["valid"], [True, True, True])
    np.testing.assert_array_equal(found["index"], [0, 1, 2])


def test_refined_boxes_are_those_of_the_class():
    config = _config()
    config.model.update(max_regions=1)
    deltas = jnp.zeros((1, 2, 4)).at[0, 1].set(jnp.array([10.0, 0, 0, 0]))  # class 2: one width to the right
    logits = jnp.array([[0.0, 0, 5]])
    box = jnp.array([[0.0, 0, 8, 8]])
    model, size = from_config(config.model), jnp.array([32, 32])
    found = jax.jit(partial(select_regions, model))(box, jnp.array([True]), logits, deltas, size)
    np.testing.assert_allclose(found["boxes"], [[8, 0, 16, 8]], atol=1e-5)


def test_a_smaller_picture_and_the_published_options():
    config = _config()
    config.model.update(
        pooling="max", refine_boxes=False, num_attributes=3, head_stride=1, head_dilation=2, min_regions=3
    )
    model = from_config(config.model)
    images = np.random.default_rng(0).integers(0, 255, (2, _SIDE, _SIDE, 3)).astype(np.uint8)
    params = jax.jit(model.init)(jax.random.key(0), images, jnp.ones((2, 1, 4)))["params"]
    regions = detect(params, images, config.model, sizes=np.array([[16, 24], [32, 32]]))
    assert regions["attributes"].shape == (2, 4)
    assert np.all((regions["attributes"] > 0) == regions["valid"])
    assert regions["boxes"][0, :, 2].max() <= 24 and regions["boxes"][0, :, 3].max() <= 16
    with pytest.raises(ValueError, match="uint8"):
        detect(params, images.astype(np.float32), config.model)


def test_anchor_targets_by_hand():
    anchors = jnp.array([[0.0, 0, 10, 10], [0, 0, 10, 12], [20, 0, 30, 10], [0, 20, 8, 28], [60, 60, 70, 70]])
    boxes = jnp.array([[0.0, 0, 10, 10], [0, 22, 10, 30], [0, 0, 0, 0]])
    classes = jnp.array([1, 2, 0])
    sampling = Sampling(anchors=8)
    targets = jax.jit(partial(anchor_targets, sampling=sampling))
    positive, chosen, code = targets(jax.random.key(0), anchors, boxes, classes, jnp.array([32.0, 32.0]))
    # 0: overlap 1. 1: overlap 10 / 12. 2: none. 3: 0.6 x 0.8 = 48 / (64 + 80 - 48), the second object's best.
    np.testing.assert_array_equal(positive, [True, True, False, True, False])
    np.testing.assert_array_equal(chosen, [True, True, True, True, False])  # 4 lies outside the picture
    np.testing.assert_allclose(code[3], [1 / 8, 2 / 8, np.log(10 / 8), 0], rtol=1e-5)


def test_region_targets_by_hand():
    proposals = jnp.array([[0.0, 0, 10, 8], [20, 20, 30, 30], [0, 0, 0, 0]])
    boxes, classes = jnp.array([[0.0, 0, 10, 10], [0, 0, 0, 0]]), jnp.array([2, 0])
    sampling = Sampling(regions=6, region_positive_fraction=0.5)
    targets = jax.jit(partial(region_targets, box_weights=(1.0, 1, 1, 1), sampling=sampling))
    valid = jnp.array([True, True, False])
    regions, labels, chosen, code = targets(jax.random.key(0), proposals, valid, boxes, classes)
    # Positives first: the proposal and the true box; then the background; the rest is padding.
    np.testing.assert_array_equal(labels, [2, 2, 0, 0, 0, 0])
    np.testing.assert_array_equal(chosen, [True, True, True, False, False, False])
    np.testing.assert_array_equal(regions[:3], [[0, 0, 10, 8], [0, 0, 10, 10], [20, 20, 30, 30]])
    np.testing.assert_allclose(code[0], [0, 1 / 8, 0, np.log(10 / 8)], rtol=1e-5, atol=1e-6)


def test_sampling_is_uniform_and_exact():
    candidates = jnp.arange(10) % 2 == 0
    draws = jax.vmap(lambda k: sample(k, candidates, 2))(jax.random.split(jax.random.key(0), 2000))
    assert np.all(draws.sum(1) == 2)
    share = np.asarray(draws.mean(0))
    assert not share[1::2].any()
    np.testing.assert_allclose(share[::2], 0.4, atol=0.05)


def test_smooth_l1_by_hand():
    np.testing.assert_allclose(smooth_l1(jnp.array([0.25, -2.0]), 0.5), [0.0625, 1.75], rtol=1e-6)


def _regions(boxes, classes, scores=None):
    boxes = np.array(boxes, np.float64).reshape(-1, 4)
    return Regions(boxes, np.array(classes), None if scores is None else np.array(scores))


def test_average_precision_by_hand():
    a, b, far = (0, 0, 10, 10), (20, 20, 30, 30), (50, 50, 60, 60)
    truth = [_regions([a, b], [1, 1]), _regions([a], [2])]
    # Class 1 by score: right (a), false (a again), right (b): precision 1, 1/2, 2/3; recall 1/2, 1/2, 1.
    # All points: 1/2 * 1 + 1/2 * 2/3 = 5/6. Class 2: false, then right: 1/2.
    found = [
        _regions([a, b, a], [1, 1, 1], [0.9, 0.2, 0.8]),
        _regions([far, a], [2, 2], [0.7, 0.6]),
    ]
    mean, by_class = average_precision(found, truth)
    assert by_class[1] == pytest.approx(5 / 6) and by_class[2] == pytest.approx(1 / 2)
    assert mean == pytest.approx(2 / 3)
    nothing = [_regions([], [], []), _regions([], [], [])]
    assert average_precision(nothing, truth)[0] == 0
    with pytest.raises(ValueError, match="2 pictures"):
        average_precision(nothing, truth[:1])


def test_recall_and_class_accuracy_by_hand():
    a, b = (0, 0, 10, 10), (20, 20, 30, 30)
    truth = [_regions([a, b], [1, 2]), _regions([a], [1])]
    found = [_regions([(0, 0, 10, 9), (0, 0, 10, 6)], [3, 1], [0.5, 0.9]), _regions([a], [1], [1.0])]
    assert recall_and_class_accuracy(found, truth) == (pytest.approx(2 / 3), 0.5)


def test_batches_are_a_function_of_the_step():
    batches = DetectorBatches(_Rectangles(10, 0), 4, (_SIDE, _SIDE, 2), seed=3)
    stream = batches.from_step(0)
    run = [next(stream) for _ in range(5)]
    later = next(batches.from_step(3))
    for name in later:
        np.testing.assert_array_equal(later[name], run[3][name])
    assert not np.array_equal(run[0]["images"], run[2]["images"])
    assert np.all((run[0]["boxes"].max(-1) > 0) == (run[0]["classes"] > 0))
    with pytest.raises(ValueError, match="max_objects is 1"):
        stream = DetectorBatches(_Rectangles(10, 0), 4, (_SIDE, _SIDE, 1), seed=0).from_step(0)
        next(stream), next(stream)


@pytest.mark.parametrize(
    "size, expected",
    [((10, 20), (20, 40)), ((20, 30), (27, 40)), ((30, 30), (30, 30)), ((300, 4), (40, 1))],
)
def test_resizing_by_the_shorter_side_unless_the_longer_gets_too_long(size, expected):
    image, scale = resized(np.full((*size, 3), 200, np.uint8), 30, 40)
    assert image.shape == (*expected, 3) and scale == min(30 / min(size), 40 / max(size))
    canvas = in_corner(image, 40, 40)
    assert np.all(canvas[: expected[0], : expected[1]] == 200)
    assert canvas.sum() == 200 * 3 * expected[0] * expected[1]


def test_sides_are_rounded_as_detectron2_rounds_them():
    # 600 / 191 * 400 and then back to 1,000 gives 477.49999 for 191 and not 477.5.
    image, _ = resized(np.zeros((191, 400, 3), np.uint8), 600, 1000)
    assert image.shape == (477, 1000, 3)


def test_every_config_builds():
    for variant in ("tiny", "base"):
        config = get_config(variant)
        model = from_config(config.model)
        Sampling(**config.sampling)
        image = jax.ShapeDtypeStruct((1, config.model.max_side, config.model.max_side, 3), jnp.uint8)
        boxes = jax.ShapeDtypeStruct((1, 1, 4), jnp.float32)
        shapes = jax.eval_shape(model.init, jax.random.key(0), image, boxes)["params"]
        assert shapes["classifier"]["kernel"].shape == (model.feature_size, config.model.num_classes + 1)
    assert get_config("base").model.head_width * 4 == 2048
    with pytest.raises(ValueError, match="unknown variant"):
        get_config("huge")
