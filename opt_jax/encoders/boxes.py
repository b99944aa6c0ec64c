"""Arithmetic on boxes: overlap, the regression code, clipping, anchors and non-maximum suppression.

A box is (x1, y1, x2, y2) in pixels, continuous coordinates: its width is x2 - x1 (no "+ 1").
Everything has static shapes, so it runs inside jit and under vmap.
Sources: Faster R-CNN, arXiv 1506.01497, section 3.1.2 (code, anchors) and 3.3 (suppression).
"""

import jax
import jax.numpy as jnp
import numpy as np

# exp() of a larger log-scale would turn a 16-pixel anchor into a box of over 1,000 pixels.
MAX_LOG_SCALE = float(np.log(1000.0 / 16.0))


def area(boxes: jax.Array) -> jax.Array:
    """Areas [...] of boxes [..., 4]; an inverted box has area 0."""
    sides = jnp.maximum(boxes[..., 2:] - boxes[..., :2], 0)
    return sides[..., 0] * sides[..., 1]


def iou(first: jax.Array, second: jax.Array) -> jax.Array:
    """Intersection over union [..., M, N] of boxes [..., M, 4] and [..., N, 4]; 0 where both are empty."""
    first, second = first[..., :, None, :], second[..., None, :, :]
    low = jnp.maximum(first[..., :2], second[..., :2])
    high = jnp.minimum(first[..., 2:], second[..., 2:])
    sides = jnp.maximum(high - low, 0)
    intersection = sides[..., 0] * sides[..., 1]
    union = area(first) + area(second) - intersection
    return jnp.where(union > 0, intersection / jnp.where(union > 0, union, 1), 0)


def _centres_and_sides(boxes):
    sides = boxes[..., 2:] - boxes[..., :2]
    return boxes[..., :2] + 0.5 * sides, sides


def encode_boxes(boxes: jax.Array, anchors: jax.Array, weights=(1.0, 1.0, 1.0, 1.0)) -> jax.Array:
    """Regression targets [..., 4] (dx, dy, dw, dh) that take `anchors` [..., 4] to `boxes` [..., 4].

    Each component is multiplied by its weight. Sides are bounded below by 1e-3 pixels, so that
    padding (all zeros) gives finite numbers.
    """
    centres, sides = _centres_and_sides(boxes)
    anchor_centres, anchor_sides = _centres_and_sides(anchors)
    sides, anchor_sides = jnp.maximum(sides, 1e-3), jnp.maximum(anchor_sides, 1e-3)
    shift = (centres - anchor_centres) / anchor_sides
    scale = jnp.log(sides / anchor_sides)
    return jnp.concatenate([shift, scale], axis=-1) * jnp.asarray(weights, boxes.dtype)


def decode_boxes(deltas: jax.Array, anchors: jax.Array, weights=(1.0, 1.0, 1.0, 1.0)) -> jax.Array:
    """Boxes [..., 4] from `deltas` [..., 4] on `anchors` [..., 4]; the inverse of `encode_boxes`."""
    deltas = deltas / jnp.asarray(weights, deltas.dtype)
    anchor_centres, anchor_sides = _centres_and_sides(anchors)
    centres = anchor_centres + deltas[..., :2] * anchor_sides
    sides = anchor_sides * jnp.exp(jnp.minimum(deltas[..., 2:], MAX_LOG_SCALE))
    return jnp.concatenate([centres - 0.5 * sides, centres + 0.5 * sides], axis=-1)


def clip_boxes(boxes: jax.Array, size: jax.Array) -> jax.Array:
    """Boxes [N, 4] cut to a picture of `size` [2] = (height, width) pixels."""
    limit = jnp.asarray(size, boxes.dtype)[jnp.array([1, 0, 1, 0])]
    return jnp.clip(boxes, 0, limit)


def anchor_grid(height: int, width: int, stride: int, sizes, ratios, offset: float = 0.5) -> np.ndarray:
    """Anchors f32 [height * width * len(sizes) * len(ratios), 4], in the order row, column, size, ratio.

    `sizes` are square roots of areas in pixels, `ratios` are height / width. An anchor is centred
    in its cell of `stride` pixels, `offset` of it from the upper left corner.
    """
    sides = [(size / ratio**0.5, size * ratio**0.5) for size in sizes for ratio in ratios]
    half = np.array([(-w / 2, -h / 2, w / 2, h / 2) for w, h in sides], np.float32)
    y, x = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    centres = (np.stack([x, y, x, y], axis=-1).astype(np.float32) + offset) * stride
    return (centres[:, :, None, :] + half).reshape(-1, 4).astype(np.float32)


def keep_after_nms(overlaps: jax.Array, scores: jax.Array, threshold: float, valid: jax.Array) -> jax.Array:
    """Exact greedy non-maximum suppression on a matrix of overlaps.

    Args:
      overlaps: [N, N], intersection over union of every pair.
      scores: [N]; of equal scores the lower index goes first.
      threshold: a box is dropped when it overlaps a kept box of higher score by more than this.
      valid: [N] bool, False for padding, which is neither kept nor suppresses anything.

    Returns:
      [N] bool, True where the box is kept, in the order of the input.

    The greedy answer is the only fixed point of "kept = no kept predecessor overlaps me"; after k
    rounds the k best boxes are settled, so the loop ends after at most N (usually 2 to 5) rounds.
    """
    count = scores.shape[0]
    order = jnp.argsort(jnp.where(valid, -scores, jnp.inf), stable=True)
    rank = jnp.zeros(count, jnp.int32).at[order].set(jnp.arange(count, dtype=jnp.int32))
    # [i, j]: j goes before i and covers it.
    suppresses = (overlaps > threshold) & (rank[None, :] < rank[:, None])

    def differs(state):
        return state[1]

    def step(state):
        kept, _ = state
        new = valid & ~jnp.any(suppresses & kept[None, :], axis=1)
        return new, jnp.any(new != kept)

    kept, _ = jax.lax.while_loop(differs, step, (valid, jnp.any(valid)))
    return kept


def nms(boxes: jax.Array, scores: jax.Array, threshold: float, valid: jax.Array) -> jax.Array:
    """Greedy non-maximum suppression of boxes [N, 4]; see `keep_after_nms`. Returns [N] bool."""
    return keep_after_nms(iou(boxes, boxes), scores, threshold, valid)
