"""Training objectives of Faster R-CNN: who is assigned to which object, and the four losses.

Pure functions with static shapes; the random choice of examples comes from the key alone. Boxes of
the truth are padded: `classes` 0 marks padding. Losses are (sum, count). Source: arXiv 1506.01497,
sections 3.1.2 and 3.1.3; Fast R-CNN, arXiv 1504.08083, section 2.3.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from opt_jax.encoders import boxes as box_ops
from opt_jax.encoders.faster_rcnn import FasterRCNN


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Overlaps that make a positive or negative example, and how many of each a picture gives."""

    anchors: int = 256
    anchor_positive_fraction: float = 0.5
    anchor_positive_overlap: float = 0.7
    anchor_negative_overlap: float = 0.3
    regions: int = 128
    region_positive_fraction: float = 0.25
    region_positive_overlap: float = 0.5
    # Smooth-L1 turns from square to linear here (in units of the box code).
    anchor_beta: float = 1 / 9
    region_beta: float = 1.0


def sample(key, candidates: jax.Array, count) -> jax.Array:
    """Up to `count` (may be traced) of the True entries of `candidates` [N], uniformly: bool [N]."""
    draw = jnp.where(candidates, jax.random.uniform(key, candidates.shape), 2.0)
    rank = jnp.argsort(jnp.argsort(draw))
    return candidates & (rank < count)


def assign(overlaps: jax.Array, real: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Best object of every box: overlap [N] and index [N], of `overlaps` [N, G]; `real` [G]: no padding."""
    overlaps = jnp.where(real[None, :], overlaps, 0)
    return overlaps.max(1), overlaps.argmax(1)


def anchor_targets(key, anchors, boxes, classes, size, sampling: Sampling):
    """Labels of one picture's anchors.

    An anchor is positive when it overlaps an object by `anchor_positive_overlap` or is that object's
    best; negative below `anchor_negative_overlap`. Anchors centred outside the picture take no part.

    Args:
      anchors [N, 4], boxes [G, 4], classes i32 [G] (0 = padding), size [2] (height, width).

    Returns:
      positive [N] bool and chosen [N] bool (positives and negatives sampled), box code [N, 4].
    """
    real = classes > 0
    overlaps = jnp.where(real[None, :], box_ops.iou(anchors, boxes), 0)
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    inside = jnp.all(centres <= size[::-1], axis=1)
    overlaps = jnp.where(inside[:, None], overlaps, 0)
    best, match = assign(overlaps, real)
    # Equal overlaps are all "best": a symmetric object may have two or four such anchors.
    is_best = jnp.any((overlaps >= overlaps.max(0) - 1e-6) & real[None, :] & (overlaps > 0), axis=1)
    positive = (best >= sampling.anchor_positive_overlap) | is_best
    negative = (best < sampling.anchor_negative_overlap) & ~is_best & inside
    positive_key, negative_key = jax.random.split(key)
    positive = sample(positive_key, positive, int(sampling.anchors * sampling.anchor_positive_fraction))
    negative = sample(negative_key, negative, sampling.anchors - positive.sum())
    return positive, positive | negative, box_ops.encode_boxes(boxes[match], anchors)


def region_targets(key, proposals, valid, boxes, classes, box_weights, sampling: Sampling):
    """The regions of one picture that train the head: sampled proposals and the true boxes themselves.

    Args:
      proposals [P, 4], valid [P], boxes [G, 4], classes i32 [G] (0 = padding).

    Returns:
      regions [Q, 4], labels i32 [Q] (0 = background), chosen [Q] bool, box code [Q, 4]; Q = sampling.regions.
    """
    real = classes > 0
    candidates = jnp.concatenate([proposals, boxes])
    usable = jnp.concatenate([valid, real])
    best, match = assign(box_ops.iou(candidates, boxes), real)
    positive = usable & (best >= sampling.region_positive_overlap)
    negative = usable & ~positive
    positive_key, negative_key = jax.random.split(key)
    positive = sample(positive_key, positive, int(sampling.regions * sampling.region_positive_fraction))
    negative = sample(negative_key, negative, sampling.regions - positive.sum())
    index = jnp.argsort(jnp.where(positive, 0, jnp.where(negative, 1, 2)), stable=True)
    missing = max(0, sampling.regions - index.shape[0])
    index = jnp.pad(index[: sampling.regions], (0, missing))
    chosen = (positive | negative)[index] & (jnp.arange(sampling.regions) < candidates.shape[0])
    labels = jnp.where(positive[index] & chosen, classes[match[index]], 0)
    regions = jnp.where(chosen[:, None], candidates[index], 0)
    return regions, labels, chosen, box_ops.encode_boxes(boxes[match[index]], regions, box_weights)


def smooth_l1(error: jax.Array, beta: float) -> jax.Array:
    """0.5 e^2 / beta where |e| < beta, |e| - beta / 2 beyond; elementwise."""
    size = jnp.abs(error)
    return jnp.where(size < beta, 0.5 * size**2 / beta, size - 0.5 * beta)


def losses(
    model: FasterRCNN, params, batch, key, sampling: Sampling
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The four losses of a batch as (sum, count).

    The head's losses are divided by the regions asked for, not by those found: counts must not depend
    on the parameters, or gradient accumulation would run the forward twice.

    Args:
      batch: images uint8 [B, H, W, 3], boxes f32 [B, G, 4], classes i32 [B, G] (0 = padding), sizes f32
        [B, 2] (height, width) of the real part of each picture.

    Returns:
      rpn_objectness and rpn_box (count: sampled anchors), roi_class and roi_box (B * sampling.regions).
    """
    variables = {"params": params}
    images, boxes, classes, sizes = (batch[k] for k in ("images", "boxes", "classes", "sizes"))
    features = model.apply(variables, images, sizes, method="feature_map")
    objectness, deltas = model.apply(variables, features, method="score_anchors")
    anchors = jnp.asarray(model.anchors(*features.shape[1:3]))
    anchor_key, region_key = jax.random.split(key)
    keys = jax.random.split(anchor_key, images.shape[0])
    positive, chosen, code = jax.vmap(
        lambda k, b, c, s: anchor_targets(k, anchors, b, c, s, sampling)
    )(keys, boxes, classes, sizes)
    objectness_loss = optax.sigmoid_binary_cross_entropy(objectness, positive.astype(jnp.float32))
    anchor_loss = smooth_l1(deltas - code, sampling.anchor_beta).sum(-1)
    anchor_count = chosen.sum().astype(jnp.float32)

    # Proposals are data to the head: no gradient flows through their coordinates.
    proposals, valid = jax.lax.stop_gradient(
        model.apply(variables, objectness, deltas, features.shape[1:3], sizes, method="propose")
    )
    keys = jax.random.split(region_key, images.shape[0])
    regions, labels, region_chosen, region_code = jax.vmap(
        lambda k, p, v, b, c: region_targets(k, p, v, b, c, model.box_weights, sampling)
    )(keys, proposals, valid, boxes, classes)
    pooled = model.apply(variables, features, regions, sizes, method="describe")
    logits, region_deltas = model.apply(variables, pooled, method="classify")
    class_loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    of_label = jnp.maximum(labels - 1, 0)[..., None, None]
    region_deltas = jnp.take_along_axis(region_deltas, of_label, axis=2)[:, :, 0]
    region_loss = smooth_l1(region_deltas - region_code, sampling.region_beta).sum(-1)
    region_count = jnp.float32(labels.size)
    return {
        "rpn_objectness": (jnp.sum(objectness_loss * chosen), anchor_count),
        "rpn_box": (jnp.sum(anchor_loss * positive), anchor_count),
        "roi_class": (jnp.sum(class_loss * region_chosen), region_count),
        "roi_box": (jnp.sum(region_loss * (labels > 0)), region_count),
    }
