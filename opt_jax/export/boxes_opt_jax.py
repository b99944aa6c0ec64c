"""Arithmetic on boxes (x1, y1, x2, y2) in pixels: overlap, regression code, anchors, suppression.

Faster R-CNN, arXiv 1506.01497, sections 3.1.2 and 3.3.
"""

import math

import numpy as np
import torch
from torch import Tensor

# exp() of a larger log-scale would turn a 16-pixel anchor into a box of over 1,000 pixels.
MAX_LOG_SCALE = math.log(1000 / 16)
TOGETHER = 1 << 23  # overlaps in one call


def area(boxes: Tensor) -> Tensor:
    """[...] of boxes [..., 4]; an inverted box has none."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)


def iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union [..., M, N] of boxes [..., M, 4] and [..., N, 4]; 0 where both are empty."""
    first, second = first[..., :, None, :], second[..., None, :, :]
    low = torch.maximum(first[..., :2], second[..., :2])
    high = torch.minimum(first[..., 2:], second[..., 2:])
    common = (high - low).clamp(min=0).prod(-1)
    union = area(first) + area(second) - common
    return torch.where(union > 0, common / torch.where(union > 0, union, 1), 0)


def decode_boxes(deltas: Tensor, anchors: Tensor, weights=(1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """Boxes [..., 4] of the regression code `deltas` [..., 4] on `anchors` [..., 4]."""
    deltas = deltas / deltas.new_tensor(weights)
    sides = anchors[..., 2:] - anchors[..., :2]
    centres = anchors[..., :2] + 0.5 * sides + deltas[..., :2] * sides
    half = 0.5 * (sides * deltas[..., 2:].clamp(max=MAX_LOG_SCALE).exp())
    return torch.cat([centres - half, centres + half], -1)


def clip_boxes(boxes: Tensor, height: int, width: int) -> Tensor:
    """Boxes [..., 4] cut to a picture of this size."""
    return boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))


def anchor_grid(height: int, width: int, stride: int, sizes, ratios, offset: float) -> np.ndarray:
    """Anchors float32 [N, 4] of a map of height x width cells, in the order row, column, size, ratio.

    sizes: square roots of areas in pixels. ratios: height / width. An anchor is centred in its cell of
    `stride` pixels, `offset` of it from the upper left corner.
    """
    sides = [(size / ratio**0.5, size * ratio**0.5) for size in sizes for ratio in ratios]
    half = np.array([(-w / 2, -h / 2, w / 2, h / 2) for w, h in sides], np.float32)
    y, x = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    centres = (np.stack([x, y, x, y], axis=-1).astype(np.float32) + offset) * stride
    return (centres[:, :, None, :] + half).reshape(-1, 4).astype(np.float32)


def suppressed(boxes: Tensor, threshold: float, most: int) -> Tensor:
    """Indices of at most `most` of the boxes [N, 4], best first, that no better kept one overlaps by more
    than the threshold."""
    # On the CPU: an accelerator would have to be waited for at each of them.
    device, boxes = boxes.device, boxes.cpu()
    alive, kept = torch.ones(len(boxes), dtype=torch.bool), []
    while len(kept) < most and bool(alive.any()):
        best = int(alive.to(torch.uint8).argmax())
        kept.append(best)
        alive &= iou(boxes[best : best + 1], boxes)[0] <= threshold
        alive[: best + 1] = False
    return torch.tensor(kept, dtype=torch.long, device=device)


def survivors(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Which of P boxes survive suppression class by class, bool [C, P].

    boxes: [P, 4], or [C, P, 4] where each class has its own. scores: [C, P]; of equal ones the first goes
    first. The greedy answer is the only fixed point of "kept = no kept better one overlaps me".
    """
    found, together = [], max(1, TOGETHER // max(1, scores.shape[1]) ** 2)
    for start in range(0, len(scores), together):
        part = slice(start, start + together)
        rank = scores[part].argsort(descending=True, stable=True).argsort()
        covers = iou(*[boxes if boxes.dim() == 2 else boxes[part]] * 2) > threshold
        covers = covers & (rank[:, None, :] < rank[:, :, None])
        kept = torch.ones_like(rank, dtype=torch.bool)
        while True:
            new = ~(covers & kept[:, None, :]).any(-1)
            if torch.equal(new, kept):
                break
            kept = new
        found.append(kept)
    return torch.cat(found)
