"""Cutting regions out of a convolutional map: RoIAlign and RoIPool as dense, static-shape arithmetic.

Bilinear interpolation is separable, so RoIAlign is two matrix products with small interpolation
matrices per region. There is no gather forward and no scatter backward.
Sources: Mask R-CNN, arXiv 1703.06870, section 3 (RoIAlign); Fast R-CNN, arXiv 1504.08083,
section 2.1 (RoIPool). Conventions (aligned, sampling ratio, rounding) are those of torchvision.
"""

import jax
import jax.numpy as jnp


def _interpolation(low, high, size: int, bins: int, sampling_ratio: int, aligned: bool, dtype):
    """Weights [R, bins, size] that average the samples of each bin along one axis of the map.

    `low`, `high` [R] are the region's ends in map cells (cell i has its centre at i when unaligned).
    """
    if aligned:
        low, high = low - 0.5, high - 0.5
        length = high - low
    else:
        length = jnp.maximum(high - low, 1.0)
    step = length / bins
    if sampling_ratio > 0:
        samples = sampling_ratio
        count = jnp.full(low.shape, samples, dtype)
    else:  # as many as there are cells in a bin, at most what a region as large as the map needs
        samples = -(-size // bins) + 1
        count = jnp.clip(jnp.ceil(step), 1, samples)
    index = jnp.arange(samples)
    offset = (jnp.arange(bins)[None, :, None] + (index + 0.5)[None, None, :] / count[:, None, None])
    at = low[:, None, None] + offset * step[:, None, None]  # [R, bins, samples]
    inside = (at >= -1) & (at <= size) & (index < count[:, None, None])
    at = jnp.clip(at, 0, size - 1)
    # A sample gives every cell the weight max(0, 1 - distance).
    weights = jnp.maximum(1 - jnp.abs(at[..., None] - jnp.arange(size)), 0) * inside[..., None]
    return (weights.sum(2) / count[:, None, None]).astype(dtype)


def roi_align(features, boxes, *, stride: int, bins: int, sampling_ratio: int = 2, aligned: bool = False):
    """RoIAlign of one picture.

    Args:
      features: [H, W, C] map.
      boxes: [R, 4] in pixels of the picture.
      stride: pixels a cell.
      bins: side P of the output grid.
      sampling_ratio: samples a bin and axis; 0 takes ceil(bin length in cells).
      aligned: half-pixel correct; False is the older convention, where sides are at least one cell.

    Returns:
      [R, P, P, C] in the dtype of `features`.
    """
    height, width, _ = features.shape
    x1, y1, x2, y2 = jnp.moveaxis(boxes / stride, -1, 0)
    rows = _interpolation(y1, y2, height, bins, sampling_ratio, aligned, features.dtype)
    columns = _interpolation(x1, x2, width, bins, sampling_ratio, aligned, features.dtype)
    pooled = jnp.einsum("rph,hwc->rpwc", rows, features)
    # Repeating the small matrices for each row spares the products a transposition: twice as fast on CPU.
    columns = jnp.broadcast_to(columns[:, None], (*pooled.shape[:2], bins, width))
    return jnp.einsum("rpqw,rpwc->rpqc", columns, pooled)


def _membership(low, high, size: int, bins: int):
    """[R, bins, size] bool: the cells of each (rounded, overlapping) bin of a RoIPool grid."""
    # Halves round away from zero, as C's round() does.
    low, high = jnp.floor(low + 0.5), jnp.floor(high + 0.5)
    step = jnp.maximum(high - low + 1, 1) / bins
    bin_index = jnp.arange(bins)
    start = jnp.floor(bin_index * step[:, None]) + low[:, None]
    end = jnp.ceil((bin_index + 1) * step[:, None]) + low[:, None]
    cell = jnp.arange(size)
    return (cell >= start[..., None]) & (cell < end[..., None])


def roi_pool(features, boxes, *, stride: int, bins: int):
    """RoIPool (maximum over quantised bins) of one picture: [H, W, C], [R, 4] -> [R, P, P, C].

    Arguments as of `roi_align`; a bin without a cell, beyond the border, is 0.
    """
    height, width, _ = features.shape
    x1, y1, x2, y2 = jnp.moveaxis(boxes / stride, -1, 0)
    rows = _membership(y1, y2, height, bins)
    columns = _membership(x1, x2, width, bins)
    lowest = jnp.finfo(features.dtype).min

    def one(region):
        row, column = region
        by_column = jnp.where(column[:, None, :, None], features[None], lowest).max(2)  # [P, H, C]
        pooled = jnp.where(row[:, None, :, None], by_column[None], lowest).max(2)  # [P, P, C]
        filled = row.any(1)[:, None] & column.any(1)[None, :]
        return jnp.where(filled[..., None], pooled, 0)

    return jax.lax.map(one, (rows, columns))
