"""The Visual Genome detector of bottom-up attention (arXiv 1707.07998), as its PyTorch conversions store it.

faster_rcnn_from_caffe_attr.pkl names arrays as detectron2 does. It takes pictures in blue, green, red and
calls the background its last class; here the stem takes red, green, blue and the background is class 0. Sizes
are read off the arrays; what arrays do not tell (pooling, strides, thresholds) is as published with it.
"""

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from opt_jax.convert.table import Row, shapes_of
from opt_jax.encoders.faster_rcnn import from_config

PIXEL_MEAN = (122.7717, 115.9465, 102.9801)  # red, green, blue
RATIOS = (0.5, 1.0, 2.0)
LARGEST_ANCHOR = 512
PREDICTOR = "roi_heads.box_predictor"


def configuration(arrays: Mapping[str, np.ndarray]) -> ConfigDict:
    """The `model` part of a detector's configuration.

    Raises: ValueError: an array that tells a size is missing, or pixels are prepared as for another detector.
    """
    needed = {
        "stem": "backbone.stem.conv1.weight",
        "rpn": "proposal_generator.rpn_head.conv.weight",
        "anchors": "proposal_generator.rpn_head.objectness_logits.weight",
        "head": "roi_heads.res5.0.conv1.weight",
        "classes": f"{PREDICTOR}.cls_score.weight",
    }
    missing = [name for name in needed.values() if name not in arrays]
    if missing:
        raise ValueError(f"there is no {', '.join(missing)}; is it a C4 detector in detectron2's names?")
    bgr = {"pixel_mean": PIXEL_MEAN[::-1], "pixel_std": (1.0, 1.0, 1.0)}
    for name, published_values in bgr.items():
        if name in arrays and not np.allclose(arrays[name].ravel(), published_values, atol=0.01):
            raise ValueError(
                f"{name} is {arrays[name].ravel().tolist()}, the Visual Genome detector's {published_values}:"
                " another detector, whose pooling and strides are not known here"
            )
    size = {what: arrays[name].shape[0] for what, name in needed.items()}
    attributes = arrays.get(f"{PREDICTOR}.attr_score.weight")
    blocks = {stage: 0 for stage in ("res2", "res3", "res4", "res5")}
    for name in arrays:
        if match := re.fullmatch(r"(?:backbone|roi_heads)\.(res[2-5])\.(\d+)\.conv1\.weight", name):
            blocks[match[1]] = max(blocks[match[1]], int(match[2]) + 1)
    return published(
        stage_sizes=tuple(blocks.values()),
        num_classes=size["classes"] - 1,
        num_attributes=0 if attributes is None else attributes.shape[0] - 1,
        width=size["stem"],
        head_width=size["head"],
        rpn_width=size["rpn"],
        num_scales=size["anchors"] // len(RATIOS),
    )


def published(
    stage_sizes: tuple[int, ...],
    num_classes: int = 1600,
    num_attributes: int = 400,
    width: int = 64,
    head_width: int = 512,
    rpn_width: int = 512,
    num_scales: int = 4,
) -> ConfigDict:
    """The configuration of a Visual Genome detector; `stage_sizes`: bottlenecks in res2 to res5."""
    return ConfigDict(
        dict(
            num_classes=num_classes,
            stage_sizes=stage_sizes,
            width=width,
            strides=(1, 2, 2),
            stride_in_1x1=True,
            head_width=head_width,
            head_stride=1,
            head_dilation=2,
            anchor_sizes=tuple(float(LARGEST_ANCHOR >> i) for i in reversed(range(num_scales))),
            anchor_ratios=RATIOS,
            rpn_width=rpn_width,
            pooling="max",
            pooled_size=14,
            sampling_ratio=0,
            aligned=False,
            box_weights=(10.0, 10.0, 5.0, 5.0),
            proposals_before_nms=6000,
            proposals=300,
            proposal_nms_threshold=0.7,
            min_box_size=0.0,
            refine_boxes=False,  # the proposals: what bottom-up attention and UNITER give their readers
            nms_threshold=0.3,
            confidence_threshold=0.2,
            min_regions=10,
            max_regions=100,
            pixel_mean=PIXEL_MEAN,
            pixel_std=(1.0, 1.0, 1.0),
            num_attributes=num_attributes,
            dtype="float32",
            min_side=600,
            max_side=1000,
            caffe_pooling=True,
            anchor_offset=0.0,
        )
    )


def shapes(config: ConfigDict) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters by path."""
    model = from_config(config.to_dict())
    images, boxes = jnp.zeros((1, 64, 64, 3), jnp.uint8), jnp.zeros((1, 1, 4))
    return shapes_of(jax.eval_shape(lambda: model.init(jax.random.key(0), images, boxes)["params"]))


def rows(config: ConfigDict) -> list[Row]:
    """The table; convolutions [out, in, h, w] become [h, w, in, out]."""

    def kernel(weight):
        return weight.transpose(2, 3, 1, 0)

    def stem_kernel(weight):
        return kernel(weight[:, ::-1])  # blue, green, red to red, green, blue

    def one_by_one(weight):
        return weight[:, :, 0, 0].T

    def matrix(weight):
        return weight.T

    def background_first(array):
        return np.roll(array, 1, axis=0)

    def background_first_matrix(weight):
        return background_first(weight).T

    def norm(theirs, ours):
        names = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
        table = [Row(rf"{theirs}\.{name}", f"{ours}/{leaf}") for name, leaf in names.items()]
        return [*table, Row(rf"{theirs}\.num_batches_tracked", None)]

    def linear(theirs, ours, transform, bias=lambda array: array):
        return [
            Row(rf"{theirs}\.weight", f"{ours}/kernel", transform),
            Row(rf"{theirs}\.bias", f"{ours}/bias", bias),
        ]

    stem, rpn = r"backbone\.stem\.conv1", r"proposal_generator\.rpn_head"
    predictor = re.escape(PREDICTOR)
    table = [
        Row(stem + r"\.weight", "trunk/stem/kernel", stem_kernel),
        *norm(stem + r"\.norm", "trunk/stem_norm"),
    ]
    for block, to in (
        (r"backbone\.(res[234])\.(\d+)\.", r"trunk/\1/block\2"),
        (r"roi_heads\.(res5)\.(\d+)\.", r"head/block\2"),
    ):
        table += [Row(block + r"(conv[123]|shortcut)\.weight", rf"{to}/\3/kernel", kernel)]
        table += norm(block + r"conv([123])\.norm", rf"{to}/norm\3")
        table += norm(block + r"shortcut\.norm", f"{to}/shortcut_norm")
    return [
        *table,
        *linear(rpn + r"\.conv", "rpn", kernel),
        *linear(rpn + r"\.objectness_logits", "rpn_objectness", one_by_one),
        *linear(rpn + r"\.anchor_deltas", "rpn_box", one_by_one),
        *linear(predictor + r"\.cls_score", "classifier", background_first_matrix, background_first),
        *linear(predictor + r"\.bbox_pred", "box", matrix),
        Row(predictor + r"\.cls_embedding\.weight", "class_embedding/embedding", background_first),
        *linear(predictor + r"\.fc_attr", "attribute_hidden", matrix),
        *linear(predictor + r"\.attr_score", "attributes", background_first_matrix, background_first),
        Row(r"proposal_generator\.anchor_generator\..*|pixel_(?:mean|std)", None),
    ]
