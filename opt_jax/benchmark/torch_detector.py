"""The detector of `opt_jax.encoders.faster_rcnn` in PyTorch, for the benchmark: same parameters, same steps.

The convolutions run in PyTorch's own layout. Suppression is written for speed in PyTorch: one loop over kept
boxes for the proposals, matrices for the classes.
"""

from collections.abc import Mapping

import jax
import numpy as np

from opt_jax.benchmark import torch_opt  # noqa: F401  (its error says how to install torch)
from opt_jax.encoders.faster_rcnn import FasterRCNN

import torch  # isort: skip
from torch.nn import functional  # isort: skip

CLASS_CHUNK = 64


class TorchDetector:
    """`model` has RoIPool, Caffe's pooling or not, unrefined boxes, and any number of attributes."""

    def __init__(self, model: FasterRCNN, params: Mapping, device: str = "cpu"):
        if model.pooling != "max" or model.refine_boxes:
            raise ValueError("the PyTorch detector is written for pooling 'max' and refine_boxes False")

        def tensor(array):
            array = np.asarray(array, np.float32)
            if array.ndim == 4:  # a convolution's
                array = array.transpose(3, 2, 0, 1)
            return torch.tensor(array, device=device)

        self.model, self.params, self.device = model, jax.tree.map(tensor, params), device

    def _convolution(self, x, params, norm, stride=1, dilation=1):
        kernel = params["kernel"]
        padding = dilation * (kernel.shape[-1] - 1) // 2
        x = functional.conv2d(x, kernel, None, stride, padding, dilation)
        return functional.batch_norm(x, norm["mean"], norm["var"], norm["scale"], norm["bias"])

    def _stage(self, x, stage, stride, dilation=1):
        for number in range(len(stage)):
            p, s = stage[f"block{number}"], stride if number == 0 else 1
            first, second = (s, 1) if self.model.stride_in_1x1 else (1, s)
            y = self._convolution(x, p["conv1"], p["norm1"], first).relu_()
            y = self._convolution(y, p["conv2"], p["norm2"], second, dilation).relu_()
            y = self._convolution(y, p["conv3"], p["norm3"])
            x = self._convolution(x, p["shortcut"], p["shortcut_norm"], s) if "shortcut" in p else x
            x = y.add_(x).relu_()
        return x

    @torch.no_grad()
    def __call__(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """uint8 [H, W, 3] -> boxes [R, 4], classes [R] from 1, scores [R], features [R, Dv] and attributes
        [R] from 1, the best region first."""
        model, params = self.model, self.params
        height, width = image.shape[:2]
        x = torch.tensor(image, device=self.device).float()
        x = (x - torch.tensor(model.pixel_mean, device=self.device)) / torch.tensor(
            model.pixel_std, device=self.device
        )
        trunk = params["trunk"]
        x = self._convolution(x.permute(2, 0, 1)[None], trunk["stem"], trunk["stem_norm"], 2).relu_()
        x = functional.max_pool2d(
            x, 3, 2, 0 if model.caffe_pooling else 1, ceil_mode=bool(model.caffe_pooling)
        )
        for stage, stride in zip(("res2", "res3", "res4"), model.strides, strict=True):
            x = self._stage(x, trunk[stage], stride)
        proposals = self._proposals(x, (height, width))
        pooled = self._stage(
            self._pool(x[0], proposals), params["head"], model.head_stride, model.head_dilation
        )
        pooled = pooled.mean((2, 3))
        probabilities = self._linear(pooled, "classifier").softmax(-1)[:, 1:]
        scores = self._surviving(proposals, probabilities).max(1).values
        scores, index = scores.topk(min(model.max_regions, len(scores)))
        rank = torch.arange(len(scores), device=self.device)
        index = index[(scores >= model.confidence_threshold) | (rank < model.min_regions)]
        classes = probabilities[index].argmax(1) + 1
        found = dict(boxes=proposals[index], classes=classes, scores=scores[: len(index)])
        found["features"] = pooled[index]
        if model.num_attributes:
            embedded = params["class_embedding"]["embedding"][classes]
            hidden = self._linear(torch.cat([pooled[index], embedded], 1), "attribute_hidden").relu_()
            found["attributes"] = self._linear(hidden, "attributes")[:, 1:].argmax(1) + 1
        return {name: value.cpu().numpy() for name, value in found.items()}

    def _linear(self, x, name):
        return x @ self.params[name]["kernel"] + self.params[name]["bias"]

    def _proposals(self, features, size):
        model, params = self.model, self.params
        hidden = functional.conv2d(
            features, params["rpn"]["kernel"], params["rpn"]["bias"], padding=1
        ).relu_()
        hidden = hidden.permute(0, 2, 3, 1)
        objectness = self._linear(hidden, "rpn_objectness").flatten()
        deltas = self._linear(hidden, "rpn_box").reshape(-1, 4)
        anchors = torch.tensor(model.anchors(*features.shape[2:]), device=self.device)
        scores, index = objectness.topk(min(model.proposals_before_nms, len(anchors)))
        deltas, anchors = deltas[index], anchors[index]
        sides = anchors[:, 2:] - anchors[:, :2]
        centres = anchors[:, :2] + sides / 2 + deltas[:, :2] * sides
        half = sides * deltas[:, 2:].clamp(max=float(np.log(1000 / 16))).exp() / 2
        limit = torch.tensor([size[1], size[0]] * 2, device=self.device)
        boxes = torch.cat([centres - half, centres + half], 1).clamp(min=0).minimum(limit)
        boxes = boxes[(boxes[:, 2:] - boxes[:, :2]).amin(1) > 0]
        overlap = self._overlaps(boxes) > model.proposal_nms_threshold
        alive = np.ones(len(boxes), bool)
        overlap, kept = overlap.cpu().numpy(), []
        for i in range(len(boxes)):
            if alive[i]:
                kept.append(i)
                alive &= ~overlap[i]
            if len(kept) == model.proposals:
                break
        return boxes[kept]

    @staticmethod
    def _overlaps(boxes):
        low = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
        high = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
        common = (high - low).clamp(min=0).prod(-1)
        area = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
        return common / (area[:, None] + area[None] - common).clamp(min=1e-12)

    def _pool(self, features, boxes):
        """RoIPool of [C, h, w]: [P, C, bins, bins]; looked up in a table of window maxima, as on the other
        side."""
        channels, *size = features.shape
        bins = self.model.pooled_size
        low, high = torch.floor(boxes / self.model.stride + 0.5).split(2, 1)  # (x, y) each
        step = (high - low + 1).clamp(min=1) / bins
        index = torch.arange(bins, device=self.device)
        limit = torch.tensor(size[::-1], device=self.device)[:, None]
        start = (torch.floor(index * step[..., None]) + low[..., None]).clamp(min=0).minimum(limit).int()
        end = (torch.ceil((index + 1) * step[..., None]) + low[..., None]).clamp(min=0).minimum(limit).int()
        length = end - start  # [P, 2, bins]
        levels = int(length.max()).bit_length()
        table = torch.stack(
            [torch.stack(self._widened(x, 2, levels)) for x in self._widened(features, 1, levels)]
        )
        table = table.permute(0, 1, 3, 4, 2).reshape(-1, channels)
        level = (length[..., None] >= 2 ** torch.arange(1, levels, device=self.device)).sum(-1)
        firsts = [start, (start + length - 2**level).clamp(min=0)]
        window = (level[:, 1, :, None] * levels + level[:, 0, None, :]) * (size[0] * size[1])
        pooled = None
        for row in firsts:
            for column in firsts:
                at = window + row[:, 1, :, None].clamp(max=size[0] - 1) * size[1]
                at = at + column[:, 0, None, :].clamp(max=size[1] - 1)
                found = table[at.long()]
                pooled = found if pooled is None else torch.maximum(pooled, found)
        filled = (length[:, 1] > 0)[:, :, None] & (length[:, 0] > 0)[:, None, :]
        return (pooled * filled[..., None]).permute(0, 3, 1, 2).contiguous()

    @staticmethod
    def _widened(x, axis, levels):
        """[x, the maxima of 2 neighbours along an axis, of 4, ...], as many as `levels`."""
        found = [x]
        for level in range(levels - 1):
            ahead = (
                found[-1].narrow(axis, 2**level, x.shape[axis] - 2**level)
                if x.shape[axis] > 2**level
                else None
            )
            wider = found[-1].clone()
            if ahead is not None:
                part = wider.narrow(axis, 0, ahead.shape[axis])
                torch.maximum(part, ahead, out=part)
            found.append(wider)
        return found

    def _surviving(self, boxes, probabilities):
        """Probabilities [P, C], 0 where a box of the same class with a better one overlaps it."""
        boxes = boxes[(boxes[:, 2:] - boxes[:, :2]).amin(1) > 0]
        overlap = self._overlaps(boxes) > self.model.nms_threshold
        result = torch.empty_like(probabilities)
        for start in range(0, probabilities.shape[1], CLASS_CHUNK):
            scores = probabilities[:, start : start + CLASS_CHUNK].T
            rank = scores.argsort(descending=True, stable=True).argsort()
            suppresses = overlap[None] & (rank[:, None, :] < rank[:, :, None])
            kept = torch.ones_like(scores, dtype=torch.bool)
            while True:
                new = ~(suppresses & kept[:, None, :]).any(-1)
                if torch.equal(new, kept):
                    break
                kept = new
            result[:, start : start + CLASS_CHUNK] = (scores * kept).T
        return result
