"""Faster R-CNN of the C4 kind (arXiv 1506.01497): the regions of a picture, chosen as in bottom-up attention
(arXiv 1707.07998, section 3.1), and for each the mean of res5 as its feature.

Letters: H and W pixels, h and w cells of the map, N anchors, P proposals, R regions given back, C classes
without the background, which is class 0, F numbers of a feature.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .boxes_opt_jax import anchor_grid, clip_boxes, decode_boxes, suppressed, survivors
from .images_opt_jax import resized
from .pooling_opt_jax import RoIPool, roi_align
from .resnet_opt_jax import EXPANSION, Convolution, ResidualStage, ResNetTrunk

HEAD_NUMBERS = 1 << 23  # of one output of res5: regions go through in parts of at most this
DEFAULTS = {"caffe_pooling": False, "anchor_offset": 0.5}


class Detector(nn.Module):
    """The detector. config: of the folder's config.json."""

    def __init__(self, config: dict):
        super().__init__()
        self.config = config = DEFAULTS | config
        width, self.feature_size = config["width"], EXPANSION * config["head_width"]
        self.stride = int(4 * np.prod(config["strides"]))
        self.trunk = ResNetTrunk(config)
        head = (config["head_width"], config["head_stride"], config["head_dilation"], config["stride_in_1x1"])
        self.head = ResidualStage(config["stage_sizes"][3], 4 * EXPANSION * width, *head)
        anchors = len(config["anchor_sizes"]) * len(config["anchor_ratios"])
        self.rpn = Convolution(4 * EXPANSION * width, config["rpn_width"], 3, bias=True)
        self.rpn_objectness = nn.Linear(config["rpn_width"], anchors)
        self.rpn_box = nn.Linear(config["rpn_width"], 4 * anchors)
        self.classifier = nn.Linear(self.feature_size, config["num_classes"] + 1)
        self.box = nn.Linear(self.feature_size, 4 * config["num_classes"])
        if attributes := config["num_attributes"]:
            embedded = self.feature_size // 8
            self.class_embedding = nn.Embedding(config["num_classes"] + 1, embedded)
            self.attribute_hidden = nn.Linear(self.feature_size + embedded, self.feature_size // 4)
            self.attributes = nn.Linear(self.feature_size // 4, attributes + 1)

    @classmethod
    def from_folder(cls, folder: Path) -> "Detector":
        """In evaluation mode, of a folder with config.json and model.safetensors."""
        module = cls(json.loads((folder / "config.json").read_text()))
        module.load_state_dict(load_file(folder / "model.safetensors"), assign=True)
        return module.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, image: np.ndarray) -> dict[str, Tensor]:
        """Regions of a picture uint8 [H, W, 3], the best first.

        Returns: features [R, F], boxes [R, 4] in pixels of the picture as `resized` made it, height and width
          of which are `size`; classes int [R] from 1, scores [R]; with an attribute head attributes int [R]
          from 1.
        """
        config = self.config
        image = resized(image, config["min_side"], config["max_side"])
        size = image.shape[:2]
        features = self.feature_map(image)
        proposals = self.propose(features, *size)
        pooled = self.describe(features, proposals)
        index, boxes, classes, scores = self.select(pooled, proposals, *size)
        found = {"features": pooled[index], "boxes": boxes, "classes": classes, "scores": scores}
        if config["num_attributes"]:
            hidden = torch.cat([found["features"], self.class_embedding(classes)], 1)
            logits = self.attributes(self.attribute_hidden(hidden).relu())
            found["attributes"] = logits[:, 1:].argmax(1) + 1
        return found | {"size": torch.tensor(size)}

    def feature_map(self, image: np.ndarray) -> Tensor:
        """uint8 [H, W, 3] to the map [1, D, h, w], in the dtype of the configuration."""
        weight, config = self.classifier.weight, self.config
        x = torch.from_numpy(np.array(image)).to(weight.device, weight.dtype)
        x = (x - x.new_tensor(config["pixel_mean"])) / x.new_tensor(config["pixel_std"])
        narrow = config["dtype"] in ("bfloat16", "float16")
        return self.trunk(x.permute(2, 0, 1)[None].to(getattr(torch, config["dtype"]) if narrow else x.dtype))

    def score_anchors(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Objectness logits [N] and box code [N, 4] of the map [1, D, h, w]."""
        hidden = self.rpn(features).relu()[0].permute(1, 2, 0).to(self.classifier.weight.dtype)
        return self.rpn_objectness(hidden).flatten(), self.rpn_box(hidden).reshape(-1, 4)

    def propose(self, features: Tensor, height: int, width: int) -> Tensor:
        """Proposals [P, 4] for a picture of this size, best first."""
        config = self.config
        objectness, deltas = self.score_anchors(features)
        order = objectness.argsort(descending=True, stable=True)[: config["proposals_before_nms"]]
        grid = (config["anchor_sizes"], config["anchor_ratios"], config["anchor_offset"])
        anchors = torch.from_numpy(anchor_grid(*features.shape[2:], self.stride, *grid)).to(deltas.device)
        boxes = clip_boxes(decode_boxes(deltas[order], anchors[order]), height, width)
        side = (boxes[:, 2:] - boxes[:, :2]).amin(1)
        boxes = boxes[(side >= config["min_box_size"]) & (side > 0)]
        return boxes[suppressed(boxes, config["proposal_nms_threshold"], config["proposals"])]

    def describe(self, features: Tensor, boxes: Tensor) -> Tensor:
        """Features [P, F] of boxes [P, 4]: the mean of res5 on what is cut out of the map [1, D, h, w]."""
        config, bins = self.config, self.config["pooled_size"]
        if config["pooling"] == "max":
            cut = RoIPool(features[0], self.stride, bins)
        else:
            options = (self.stride, bins, config["sampling_ratio"], config["aligned"])
            cut = lambda part: roi_align(features[0], part, *options)  # noqa: E731
        numbers = (-(-bins // config["head_stride"])) ** 2 * self.feature_size
        dtype = self.classifier.weight.dtype
        parts = boxes.split(max(1, HEAD_NUMBERS // numbers))
        return torch.cat([self.head(cut(part)).to(dtype).mean((2, 3)) for part in parts])

    def select(self, pooled: Tensor, proposals: Tensor, height: int, width: int) -> tuple[Tensor, ...]:
        """Which regions are given back: (index [R] of the proposals, boxes [R, 4], classes [R], scores [R]).

        A region's score is its best probability among the classes in which it survived suppression. Kept are
        those of at least `confidence_threshold`, but no fewer than `min_regions` and no more than
        `max_regions`.
        """
        config = self.config
        probabilities = self.classifier(pooled).softmax(1)[:, 1:]
        best, boxes = probabilities.argmax(1), proposals
        if config["refine_boxes"]:
            deltas = self.box(pooled).unflatten(1, (-1, 4))
            refined = decode_boxes(deltas, proposals[:, None], config["box_weights"])
            refined = clip_boxes(refined, height, width)
            boxes = refined[torch.arange(len(best), device=best.device), best]
        each = refined.transpose(0, 1) if config["refine_boxes"] else proposals
        kept = survivors(each, probabilities.T, config["nms_threshold"])
        scores = torch.where(kept.T, probabilities, 0).amax(1)
        index = scores.argsort(descending=True, stable=True)[: config["max_regions"]]
        rank = torch.arange(len(index), device=index.device)
        index = index[(scores[index] >= config["confidence_threshold"]) | (rank < config["min_regions"])]
        return index, boxes[index], best[index] + 1, scores[index]
