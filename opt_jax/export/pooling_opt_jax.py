"""Cutting regions out of a convolutional map: RoIAlign (Mask R-CNN, arXiv 1703.06870, section 3) and RoIPool
(Fast R-CNN, arXiv 1504.08083, section 2.1).

Letters: C channels, h and w cells of the map, R regions, P bins a side.
"""

import numpy as np
import torch
from torch import Tensor


def interpolation(low: Tensor, high: Tensor, size: int, bins: int, samples: int, aligned: bool) -> Tensor:
    """Weights [R, P, size] that average the samples of each bin along one axis of the map.

    low, high: [R], ends of the regions in cells. samples: a bin; 0 takes as many as it has cells.
    """
    if aligned:
        low, high = low - 0.5, high - 0.5
    length = high - low if aligned else (high - low).clamp(min=1)
    step = length / bins
    if samples:
        count = torch.full_like(low, samples)
    else:
        samples = -(-size // bins) + 1
        count = step.ceil().clamp(1, samples)
    count, index = count[:, None, None], torch.arange(samples, device=low.device)
    offset = torch.arange(bins, device=low.device)[None, :, None] + (index + 0.5) / count
    at = low[:, None, None] + offset * step[:, None, None]
    inside = (at >= -1) & (at <= size) & (index < count)
    at = at.clamp(0, size - 1)
    cells = torch.arange(size, device=low.device)
    weights = (1 - (at[..., None] - cells).abs()).clamp(min=0) * inside[..., None]
    return weights.sum(2) / count


def roi_align(features: Tensor, boxes: Tensor, stride: int, bins: int, samples: int, aligned: bool) -> Tensor:
    """Map [C, h, w], boxes [R, 4] in pixels to [R, C, P, P].

    stride: pixels a cell. aligned: half-pixel correct; False is the older convention, where sides are at
    least one cell.
    """
    x1, y1, x2, y2 = (boxes / stride).unbind(1)
    rows = interpolation(y1, y2, features.shape[1], bins, samples, aligned).to(features.dtype)
    columns = interpolation(x1, x2, features.shape[2], bins, samples, aligned).to(features.dtype)
    pooled = torch.einsum("rph,chw->rcpw", rows, features)
    return torch.einsum("rcpw,rqw->rcpq", pooled, columns)


def bin_ends(low: Tensor, high: Tensor, size: int, bins: int, dtype) -> tuple[Tensor, Tensor]:
    """First cells and lengths, [R, P] each, of the rounded, overlapping bins of regions along one axis of
    `size` cells; dtype: of numpy, in which lengths are divided."""
    # Halves round away from zero, as C's round() does.
    low, high = (torch.floor(x + 0.5).long() for x in (low, high))
    # A table made in numpy, as the published code divides: some devices multiply by a rounded reciprocal, and
    # a bin that ends on a whole number would reach one cell further.
    steps, index = np.arange(1, size + 3, dtype=dtype) / dtype(bins), np.arange(bins + 1, dtype=dtype)
    starts = torch.from_numpy(np.floor(steps[:, None] * index[:-1]).astype(np.int64)).to(low.device)
    ends = torch.from_numpy(np.ceil(steps[:, None] * index[1:]).astype(np.int64)).to(low.device)
    length = (high - low).clamp(0, size + 1)  # less one
    start = (starts[length] + low[:, None]).clamp(0, size)
    return start, (ends[length] + low[:, None]).clamp(0, size) - start


def widened(x: Tensor, axis: int, levels: int) -> list[Tensor]:
    """x, the maxima of 2 neighbours ahead along an axis, of 4, and so on."""
    found = [x]
    for step in (2**level for level in range(levels - 1)):
        wider = found[-1].clone()
        if (rest := x.shape[axis] - step) > 0:
            wider.narrow(axis, 0, rest).copy_(
                torch.maximum(found[-1].narrow(axis, 0, rest), found[-1].narrow(axis, step, rest))
            )
        found.append(wider)
    return found


class RoIPool:
    """The maximum over quantised bins of regions of one map [C, h, w].

    The maximum of a bin is that of four overlapping windows whose sides are powers of two, looked up in a
    table made once a map.
    """

    def __init__(self, features: Tensor, stride: int, bins: int):
        self.stride, self.bins, self.size = stride, bins, features.shape[1:]
        self.dtype = np.float64 if features.dtype == torch.float64 else np.float32
        self.levels = (-(-max(self.size) // bins) + 2).bit_length()
        tall = widened(features, 1, self.levels)
        table = torch.stack([torch.stack(widened(x, 2, self.levels)) for x in tall])
        self.table = table.permute(0, 1, 3, 4, 2).reshape(-1, len(features))

    def __call__(self, boxes: Tensor) -> Tensor:
        """Boxes [R, 4] in pixels to [R, C, P, P]; a bin without a cell, beyond the border, is 0."""
        x1, y1, x2, y2 = (boxes / self.stride).unbind(1)
        row_level, rows, tall = self.windows(y1, y2, self.size[0])
        column_level, columns, wide = self.windows(x1, x2, self.size[1])
        window = row_level[:, :, None] * self.levels + column_level[:, None, :]
        pooled = None
        for row in rows:
            for column in columns:
                at = window * self.size.numel() + row[:, :, None] * self.size[1] + column[:, None, :]
                found = self.table[at]
                pooled = found if pooled is None else torch.maximum(pooled, found)
        filled = (tall > 0)[:, :, None] & (wide > 0)[:, None, :]
        return torch.where(filled[..., None], pooled, 0).permute(0, 3, 1, 2)

    def windows(self, low: Tensor, high: Tensor, size: int) -> tuple[Tensor, list[Tensor], Tensor]:
        """Level [R, P], first cells [R, P] of the two windows that cover each bin, and its length [R, P]."""
        start, length = bin_ends(low, high, size, self.bins, self.dtype)
        level = (length[..., None] >= 2 ** torch.arange(1, self.levels, device=low.device)).sum(-1)
        firsts = [start, start + length - 2**level]
        return level, [first.clamp(0, size - 1) for first in firsts], length
