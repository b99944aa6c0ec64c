"""Cutting regions out of a convolutional map: RoIAlign and RoIPool as dense, static-shape arithmetic.

Bilinear interpolation is separable, so RoIAlign is two matrix products with small interpolation
matrices per region. There is no gather forward and no scatter backward.
Sources: Mask R-CNN, arXiv 1703.06870, section 3 (RoIAlign); Fast R-CNN, arXiv 1504.08083,
section 2.1 (RoIPool). Conventions (aligned, sampling ratio, rounding) are those of torchvision.
"""

import jax
import jax.numpy as jnp
import numpy as np


def _interpolation(low, high, size: int, extent, bins: int, sampling_ratio: int, aligned: bool, dtype):
    """Weights [R, bins, size] that average the samples of each bin along one axis of the map.

    `low`, `high` [R] are the region's ends in map cells (cell i has its centre at i when unaligned); cells
    from `extent` on are none.
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
    offset = jnp.arange(bins)[None, :, None] + (index + 0.5)[None, None, :] / count[:, None, None]
    at = low[:, None, None] + offset * step[:, None, None]  # [R, bins, samples]
    inside = (at >= -1) & (at <= extent) & (index < count[:, None, None])
    at = jnp.clip(at, 0, extent - 1)
    # A sample gives every cell the weight max(0, 1 - distance).
    weights = jnp.maximum(1 - jnp.abs(at[..., None] - jnp.arange(size)), 0) * inside[..., None]
    return (weights.sum(2) / count[:, None, None]).astype(dtype)


def roi_align(
    features, boxes, extent=None, *, stride: int, bins: int, sampling_ratio: int = 2, aligned: bool = False
):
    """RoIAlign of one picture.

    Args:
      features: [H, W, C] map.
      boxes: [R, 4] in pixels of the picture.
      extent: (rows, columns) [2] of the map that are the picture's; None: all.
      stride: pixels a cell.
      bins: side P of the output grid.
      sampling_ratio: samples a bin and axis; 0 takes ceil(bin length in cells).
      aligned: half-pixel correct; False is the older convention, where sides are at least one cell.

    Returns:
      [R, P, P, C] in the dtype of `features`.
    """
    height, width, _ = features.shape
    extent = (height, width) if extent is None else extent
    x1, y1, x2, y2 = jnp.moveaxis(boxes / stride, -1, 0)
    rows = _interpolation(y1, y2, height, extent[0], bins, sampling_ratio, aligned, features.dtype)
    columns = _interpolation(x1, x2, width, extent[1], bins, sampling_ratio, aligned, features.dtype)
    pooled = jnp.einsum("rph,hwc->rpwc", rows, features)
    # Repeating the small matrices for each row spares the products a transposition: twice as fast on CPU.
    columns = jnp.broadcast_to(columns[:, None], (*pooled.shape[:2], bins, width))
    return jnp.einsum("rpqw,rpwc->rpqc", columns, pooled)


def _bins(low, high, size: int, extent, bins: int, dtype):
    """First cells and lengths, i32 [R, bins] each, of the (rounded, overlapping) bins of a RoIPool grid."""
    # Halves round away from zero, as C's round() does.
    low, high = (jnp.floor(x + 0.5).astype(jnp.int32) for x in (low, high))
    # Made here and not in the program: the published code divides in `dtype`, where the compiler would
    # multiply by a rounded reciprocal, and a bin that ends on a whole number would reach one cell further.
    steps = np.arange(1, size + 3, dtype=dtype) / np.asarray(bins, dtype)
    index = np.arange(bins + 1, dtype=dtype)
    starts = np.floor(steps[:, None] * index[:-1]).astype(np.int32)
    ends = np.ceil(steps[:, None] * index[1:]).astype(np.int32)
    length = jnp.clip(high - low, 0, size + 1)  # less one
    start = jnp.clip(jnp.asarray(starts)[length] + low[:, None], 0, extent)
    end = jnp.clip(jnp.asarray(ends)[length] + low[:, None], 0, extent)
    return start, end - start


def _window_maxima(features, levels: int):
    """[levels, levels, H, W, C]: at (a, b, h, w) the maximum of 2^a rows from h and 2^b columns from w on."""
    lowest = jnp.finfo(features.dtype).min

    def doubled(x, axis, step):
        widths = [(0, step) if a == axis else (0, 0) for a in range(3)]
        ahead = jnp.pad(x, widths, constant_values=lowest)
        return jnp.maximum(x, jax.lax.slice_in_dim(ahead, step, step + x.shape[axis], axis=axis))

    tall = [features]
    for level in range(levels - 1):
        tall.append(doubled(tall[-1], 0, 2**level))
    table = []
    for x in tall:
        wide = [x]
        for level in range(levels - 1):
            wide.append(doubled(wide[-1], 1, 2**level))
        table.append(jnp.stack(wide))
    return jnp.stack(table)


def roi_pool(features, boxes, extent=None, *, stride: int, bins: int):
    """RoIPool (maximum over quantised bins) of one picture: [H, W, C], [R, 4] -> [R, P, P, C].

    Arguments as of `roi_align`; boxes are at most as large as the map, and a bin without a cell, beyond the
    border, is 0. The maximum of a bin is that of four overlapping windows whose sides are powers of two,
    looked up in a table made once a picture.
    """
    height, width, channels = features.shape
    extent = (height, width) if extent is None else extent
    x1, y1, x2, y2 = jnp.moveaxis(boxes / stride, -1, 0)
    wide_type = np.promote_types(features.dtype, np.float32)
    top, tall = _bins(y1, y2, height, extent[0], bins, wide_type)
    left, wide = _bins(x1, x2, width, extent[1], bins, wide_type)
    longest = -(-max(height, width) // bins) + 2
    levels = longest.bit_length()
    table = _window_maxima(features, levels).reshape(-1, channels)

    def corners(start, length, size):
        """Level [R, P] of the windows and the first cells [2, R, P] of the two that cover each bin."""
        level = (length[..., None] >= 2 ** jnp.arange(1, levels)).sum(-1)
        first = jnp.stack([start, start + length - 2**level])
        return level, jnp.clip(first, 0, size - 1)

    row_level, rows = corners(top, tall, height)
    column_level, columns = corners(left, wide, width)
    window = (row_level[:, :, None] * levels + column_level[:, None, :]) * (height * width)
    pooled = None
    for row in rows:
        for column in columns:
            found = table[window + row[:, :, None] * width + column[:, None, :]]
            pooled = found if pooled is None else jnp.maximum(pooled, found)
    filled = (tall > 0)[:, :, None] & (wide > 0)[:, None, :]
    return jnp.where(filled[..., None], pooled, 0)
