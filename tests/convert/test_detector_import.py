"""The Visual Genome detector: arrays in detectron2's names against a torch forward pass by these names."""

import pickle

import jax
import numpy as np
import pytest

from opt_jax.convert.__main__ import main
from opt_jax.encoders.boxes import anchor_grid
from opt_jax.encoders.faster_rcnn import detect, from_config
from opt_jax.encoders.faster_rcnn_pictures import in_corner
from opt_jax.encoders.frozen import load_frozen
from opt_jax.encoders.resnet import max_pool

torch = pytest.importorskip("torch")
functional = torch.nn.functional
WIDTH, HIDDEN, HEAD, CLASSES, ATTRIBUTES, ANCHORS = 4, 6, 8, 5, 3, 12
BLOCKS = {"backbone.res2": 1, "backbone.res3": 2, "backbone.res4": 1, "roi_heads.res5": 2}
PREDICTOR = "roi_heads.box_predictor"


def published() -> dict[str, np.ndarray]:
    """Random arrays of a small detector with an attribute head."""
    rng, arrays = np.random.default_rng(0), {}

    def conv(name, outputs, inputs, size):
        arrays[f"{name}.weight"] = rng.normal(size=(outputs, inputs, size, size)) * (inputs * size**2) ** -0.5
        for leaf in ("weight", "running_var"):
            arrays[f"{name}.norm.{leaf}"] = rng.uniform(0.5, 1.5, outputs)
        for leaf in ("bias", "running_mean"):
            arrays[f"{name}.norm.{leaf}"] = rng.normal(size=outputs) * 0.1

    def linear(name, outputs, inputs, *size):
        arrays[f"{name}.weight"] = rng.normal(size=(outputs, inputs, *size)) * inputs**-0.5
        arrays[f"{name}.bias"] = rng.normal(size=outputs) * 0.1

    conv("backbone.stem.conv1", WIDTH, 3, 7)
    inputs, width = WIDTH, WIDTH
    for stage, blocks in BLOCKS.items():
        width = HEAD if stage.endswith("res5") else width
        for block in range(blocks):
            name = f"{stage}.{block}"
            conv(f"{name}.conv1", width, inputs, 1)
            conv(f"{name}.conv2", width, width, 3)
            conv(f"{name}.conv3", 4 * width, width, 1)
            if block == 0:
                conv(f"{name}.shortcut", 4 * width, inputs, 1)
            inputs = 4 * width
        width *= 2
    rpn = "proposal_generator.rpn_head"
    linear(f"{rpn}.conv", HIDDEN, 16 * WIDTH, 3, 3)
    linear(f"{rpn}.objectness_logits", ANCHORS, HIDDEN, 1, 1)
    linear(f"{rpn}.anchor_deltas", 4 * ANCHORS, HIDDEN, 1, 1)
    arrays[f"{rpn}.anchor_deltas.weight"] *= 0.02  # so that most boxes stay in the picture
    feature = 4 * HEAD
    linear(f"{PREDICTOR}.cls_score", CLASSES + 1, feature)
    arrays[f"{PREDICTOR}.cls_score.weight"] *= 0.1
    linear(f"{PREDICTOR}.bbox_pred", 4 * CLASSES, feature)
    arrays[f"{PREDICTOR}.cls_embedding.weight"] = rng.normal(size=(CLASSES + 1, feature // 8))
    linear(f"{PREDICTOR}.fc_attr", feature // 4, feature + feature // 8)
    linear(f"{PREDICTOR}.attr_score", ATTRIBUTES + 1, feature // 4)
    arrays["proposal_generator.anchor_generator.cell_anchors.0"] = np.zeros((ANCHORS, 4))
    arrays["backbone.stem.conv1.norm.num_batches_tracked"] = np.zeros(1, np.int64)
    return {name: array.astype(np.float32) for name, array in arrays.items()}


class Reference:
    """The published network, by its names."""

    def __init__(self, arrays, dtype=torch.float32):
        self.arrays = {name: torch.from_numpy(array).to(dtype) for name, array in arrays.items()}
        self.dtype = dtype

    def conv(self, x, name, stride=1, padding=0, dilation=1):
        a = self.arrays
        x = functional.conv2d(x, a[f"{name}.weight"], None, stride, padding, dilation)
        norm = [a[f"{name}.norm.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias")]
        return functional.batch_norm(x, *norm)

    def stage(self, x, stage, stride, dilation=1):
        for block in range(BLOCKS[stage]):
            name, stride = f"{stage}.{block}", stride if block == 0 else 1
            y = self.conv(x, f"{name}.conv1", stride).relu()  # Caffe's networks stride here
            y = self.conv(y, f"{name}.conv2", 1, dilation, dilation).relu()
            y = self.conv(y, f"{name}.conv3")
            x = (y + (self.conv(x, f"{name}.shortcut", stride) if block == 0 else x)).relu()
        return x

    def linear(self, x, name):
        return functional.linear(x, self.arrays[f"{name}.weight"], self.arrays[f"{name}.bias"])

    def features(self, images):
        """uint8 [B, H, W, 3] in red, green, blue -> C4 [B, C, h, w]."""
        means = torch.tensor([102.9801, 115.9465, 122.7717], dtype=self.dtype)
        x = torch.from_numpy(images[..., ::-1].copy()).to(self.dtype) - means
        x = self.conv(x.permute(0, 3, 1, 2), "backbone.stem.conv1", 2, 3).relu()
        x = functional.max_pool2d(x, 3, 2, 0, ceil_mode=True)
        x = self.stage(x, "backbone.res2", 1)
        return self.stage(self.stage(x, "backbone.res3", 2), "backbone.res4", 2)

    def proposals(self, features):
        a, rpn = self.arrays, "proposal_generator.rpn_head"
        hidden = functional.conv2d(features, a[f"{rpn}.conv.weight"], a[f"{rpn}.conv.bias"], padding=1).relu()
        names = ("objectness_logits", "anchor_deltas")
        return [
            functional.conv2d(hidden, a[f"{rpn}.{n}.weight"], a[f"{rpn}.{n}.bias"]).permute(0, 2, 3, 1)
            for n in names
        ]

    def regions(self, crops):
        """[N, C, 7, 7] -> features, class logits (the last: background), box code, attribute logits."""
        pooled = self.stage(crops, "roi_heads.res5", 1, dilation=2).mean((2, 3))
        logits = self.linear(pooled, f"{PREDICTOR}.cls_score")
        embedded = self.arrays[f"{PREDICTOR}.cls_embedding.weight"][logits.argmax(-1)]
        hidden = self.linear(torch.cat([pooled, embedded], -1), f"{PREDICTOR}.fc_attr").relu()
        attributes = self.linear(hidden, f"{PREDICTOR}.attr_score")
        return pooled, logits, self.linear(pooled, f"{PREDICTOR}.bbox_pred"), attributes


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    directory = tmp_path_factory.mktemp("detector")
    arrays = published()
    content = {"model": arrays, "__author__": "Caffe", "matching_heuristics": True}
    (directory / "vg.pkl").write_bytes(pickle.dumps(content))
    main(["import", "--kind=faster_rcnn", f"--source={directory / 'vg.pkl'}", f"--out={directory / 'out'}"])
    return Reference(arrays), *load_frozen(directory / "out")


def close(found, expected):
    expected = expected.numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_sizes_come_from_the_arrays(imported):
    config = imported[2]
    assert config["stage_sizes"] == [1, 2, 1, 2] and config["num_classes"] == CLASSES
    assert config["num_attributes"] == ATTRIBUTES and config["anchor_sizes"] == [64.0, 128.0, 256.0, 512.0]


@pytest.mark.parametrize("shape", [(64, 96), (75, 93)])
def test_features_and_proposals(imported, shape):
    reference, params, config = imported
    images = np.random.default_rng(1).integers(0, 256, (2, *shape, 3), np.uint8)
    model = from_config(config)
    features = model.apply({"params": params}, images, method="feature_map")
    expected = reference.features(images)
    close(features, expected.permute(0, 2, 3, 1))
    objectness, deltas = model.apply({"params": params}, features, method="score_anchors")
    theirs = reference.proposals(expected)
    close(objectness, theirs[0].reshape(2, -1))
    close(deltas, theirs[1].reshape(2, -1, 4))


def test_regions_with_the_background_first(imported):
    reference, params, config = imported
    crops = np.random.default_rng(2).normal(size=(6, 7, 7, 16 * WIDTH)).astype(np.float32)

    def ours(model, crops):
        pooled = model.head(crops).mean((1, 2))
        logits = model.classifier(pooled)
        return pooled, logits, model.box(pooled), model.score_attributes(pooled, logits.argmax(-1))

    found = jax.jit(lambda crops: from_config(config).apply({"params": params}, crops, method=ours))(crops)
    pooled, logits, deltas, attributes = reference.regions(torch.from_numpy(crops.transpose(0, 3, 1, 2)))
    close(found[0], pooled)
    close(found[1], logits.roll(1, -1))
    close(found[2], deltas)
    close(found[3], attributes.roll(1, -1))


def overlap(a, b):
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    common = np.prod(np.maximum(sides, 0))
    return common / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - common)


def greedy(boxes, scores, threshold):
    kept = []
    for i in np.argsort(-scores, kind="stable"):
        if all(overlap(boxes[i], boxes[j]) <= threshold for j in kept):
            kept.append(i)
    return kept


def pooled_by_loops(features, box):
    """[C, h, w] and a box in pixels -> the largest value of each of 7 x 7 bins, 0 in an empty one."""
    channels, height, width = features.shape
    x1, y1, x2, y2 = (int(np.floor(v / 16 + 0.5)) for v in box)
    tall, wide = (y2 - y1 + 1) / 7, (x2 - x1 + 1) / 7
    out = np.zeros((channels, 7, 7))
    for p, q in np.ndindex(7, 7):
        top, bottom = y1 + int(np.floor(p * tall)), min(y1 + int(np.ceil((p + 1) * tall)), height)
        left, right = x1 + int(np.floor(q * wide)), min(x1 + int(np.ceil((q + 1) * wide)), width)
        if top < bottom and left < right:
            out[:, p, q] = features[:, top:bottom, left:right].max((1, 2))
    return out


def detected_by_loops(reference, image, config):
    """(boxes, classes, scores, features, attributes) as the published code finds them in one picture."""
    features = reference.features(image[None])
    objectness, deltas = (x[0].numpy() for x in reference.proposals(features))
    height, width = image.shape[:2]
    candidates = []
    for y, x in np.ndindex(objectness.shape[:2]):
        shapes = [(size, ratio) for size in (64.0, 128.0, 256.0, 512.0) for ratio in (0.5, 1.0, 2.0)]
        for number, (size, ratio) in enumerate(shapes):
            w, h = size / ratio**0.5, size * ratio**0.5
            dx, dy, dw, dh = deltas[y, x, 4 * number : 4 * number + 4]
            cx, cy = 16 * x + dx * w, 16 * y + dy * h
            w, h = w * np.exp(min(dw, np.log(1000 / 16))), h * np.exp(min(dh, np.log(1000 / 16)))
            box = np.array([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
            box = np.clip(box, 0, [width, height, width, height])
            candidates.append((objectness[y, x, number], box))
    candidates.sort(key=lambda pair: -pair[0])
    candidates = candidates[: config["proposals_before_nms"]]
    candidates = [(score, box) for score, box in candidates if (box[2:] > box[:2]).all()]
    scores, boxes = (np.array(column) for column in zip(*candidates, strict=True))
    boxes = boxes[greedy(boxes, scores, 0.7)[: config["proposals"]]]
    crops = np.stack([pooled_by_loops(features[0].numpy(), box) for box in boxes])
    pooled, logits, _, attributes = reference.regions(torch.from_numpy(crops))
    probabilities = logits.softmax(-1).numpy()[:, :-1]  # the background is last
    best = np.zeros(len(boxes))
    for column in probabilities.T:
        kept = greedy(boxes, column, 0.3)
        best[kept] = np.maximum(best[kept], column[kept])
    order = np.argsort(-best, kind="stable")
    count = np.clip(
        (best >= config["confidence_threshold"]).sum(), config["min_regions"], config["max_regions"]
    )
    chosen = order[:count]
    classes = probabilities[chosen].argmax(1) + 1
    embedded = reference.arrays[f"{PREDICTOR}.cls_embedding.weight"][classes - 1]
    hidden = reference.linear(torch.cat([pooled[chosen], embedded], -1), f"{PREDICTOR}.fc_attr").relu()
    attributes = reference.linear(hidden, f"{PREDICTOR}.attr_score")[:, :-1].argmax(-1).numpy() + 1
    found = dict(boxes=boxes[chosen], classes=classes, scores=best[chosen])
    return found | dict(features=pooled[chosen].numpy(), attributes=attributes)


@pytest.mark.parametrize("canvas", [None, (256, 320)])
@pytest.mark.parametrize("threshold", [0.3, 0.9])
def test_the_whole_detector_against_loops(imported, canvas, threshold):
    reference, params, config = imported
    sizes = dict(proposals=40, proposals_before_nms=200, pooled_size=7, min_regions=4, max_regions=12)
    config = config | sizes | dict(confidence_threshold=threshold, dtype="float64")
    image = np.random.default_rng(3).integers(0, 256, (251, 307, 3), np.uint8)
    arrays = {name: array.numpy() for name, array in reference.arrays.items()}
    expected = detected_by_loops(Reference(arrays, torch.float64), image, config)
    images = in_corner(image, *(canvas or image.shape[:2]))
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        found = jax.device_get(detect(params, images[None], config, np.array([image.shape[:2]])))
    valid = found.pop("valid")[0]
    assert (valid.sum() == 4) == (threshold == 0.9)
    for name, value in expected.items():
        mine = found[name][0][valid]
        assert mine.shape == value.shape, name
        np.testing.assert_allclose(mine, value, rtol=0, atol=1e-5 * np.abs(value).max(), err_msg=name)


@pytest.mark.parametrize("size", [(8, 9), (11, 6), (3, 4)])
def test_caffe_pooling_is_that_of_torch_with_ceil_mode(size):
    x = np.random.default_rng(4).normal(size=(2, *size, 3)).astype(np.float32)
    expected = functional.max_pool2d(torch.from_numpy(x).permute(0, 3, 1, 2), 3, 2, 0, ceil_mode=True)
    np.testing.assert_array_equal(max_pool(x, caffe=True), expected.permute(0, 2, 3, 1))


def test_anchors_begin_in_the_corner_of_their_cell():
    anchors = anchor_grid(1, 2, 16, (64.0,), (1.0,), offset=0.0)
    assert anchors.tolist() == [[-32, -32, 32, 32], [-16, -32, 48, 32]]


def test_a_foreign_file_is_refused(tmp_path):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"fc.weight": np.zeros((2, 2))}))
    with pytest.raises(SystemExit, match="is it a C4 detector in detectron2's names"):
        main(["import", "--kind=faster_rcnn", f"--source={tmp_path / 'x.pkl'}", f"--out={tmp_path / 'out'}"])


def test_another_detector_of_the_same_names_is_refused(tmp_path):
    arrays = published() | {"pixel_mean": np.array([[[103.53]], [[116.28]], [[123.675]]], np.float32)}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(arrays))
    with pytest.raises(SystemExit, match=r"x.pkl \(as faster_rcnn\): pixel_mean is .*another detector"):
        main(["import", "--kind=faster_rcnn", f"--source={tmp_path / 'x.pkl'}", f"--out={tmp_path / 'out'}"])
