"""Faster R-CNN of the C4 kind: one convolutional map, proposals, and res5 run on every region.

It gives OPT its vision tokens: boxes, a class and the pooled res5 feature of every region, chosen as
in bottom-up attention (arXiv 1707.07998, section 3.1; UNITER uses the same regions). Detector:
arXiv 1506.01497. Shapes are static: B pictures, N anchors, P proposals, R regions given back,
C classes without the background, which is class 0.

Pictures are uint8 [B, H, W, 3] RGB, all of one size. A smaller one lies in the upper left corner and
`sizes` says how large it is; `faster_rcnn_pictures` makes both. Its answer is that of the picture alone.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from opt_jax.encoders import boxes as box_ops
from opt_jax.encoders.faster_rcnn_pooling import roi_align, roi_pool
from opt_jax.encoders.resnet import EXPANSION, Convolution, ResidualStage, ResNetTrunk, blank

# Classes suppressed together: bounds the [classes, P, P] overlaps with 1,600 classes and 300 proposals.
_CLASS_CHUNK = 64
# Bytes of one res5 output: regions go through res5 in parts of at most this, for memory. A CPU is also 10 %
# faster on parts that stay in its caches.
_HEAD_BYTES = {"cpu": 16 << 20}
_HEAD_BYTES_ELSEWHERE = 256 << 20


class FasterRCNN(nn.Module):
    """The detector's parameters and forward pieces; `detect` puts them together.

    Attributes:
      num_classes: C. num_attributes: 0 for no attribute head.
      stage_sizes: bottlenecks in res2, res3, res4, res5. width: of the stem. strides: of res2, res3, res4.
      stride_in_1x1: where a bottleneck's stride sits.
      head_width, head_stride, head_dilation: res5; a region's feature has 4 * head_width numbers.
      anchor_sizes (pixels), anchor_ratios (height / width), rpn_width.
      pooling: 'align' or 'max'; pooled_size, sampling_ratio, aligned: see `faster_rcnn_pooling`.
      box_weights: of the class-specific regression code.
      proposals_before_nms, proposals, proposal_nms_threshold, min_box_size (pixels): the RPN's output.
      refine_boxes: give back regressed boxes; False keeps the proposals, as bottom-up attention does.
      nms_threshold, confidence_threshold, min_regions, max_regions: which regions are given back.
      pixel_mean, pixel_std: of RGB in 0..255. dtype: of the convolutions ('float32', 'bfloat16').
      min_side, max_side: pictures to be detected in are resized to these, see `faster_rcnn_pictures.resized`.
      caffe_pooling: after the stem, see `resnet.max_pool`. anchor_offset: see `boxes.anchor_grid`.
    """

    num_classes: int
    stage_sizes: Sequence[int]
    width: int
    strides: Sequence[int]
    stride_in_1x1: bool
    head_width: int
    head_stride: int
    head_dilation: int
    anchor_sizes: Sequence[float]
    anchor_ratios: Sequence[float]
    rpn_width: int
    pooling: str
    pooled_size: int
    sampling_ratio: int
    aligned: bool
    box_weights: Sequence[float]
    proposals_before_nms: int
    proposals: int
    proposal_nms_threshold: float
    min_box_size: float
    refine_boxes: bool
    nms_threshold: float
    confidence_threshold: float
    min_regions: int
    max_regions: int
    pixel_mean: Sequence[float]
    pixel_std: Sequence[float]
    num_attributes: int
    dtype: str
    min_side: int
    max_side: int
    caffe_pooling: bool = False
    anchor_offset: float = 0.5

    def setup(self):
        if self.pooling not in ("align", "max"):
            raise ValueError(f"detector config: pooling is {self.pooling!r}; choose 'align' or 'max'")
        if self.max_regions > self.proposals:
            raise ValueError(
                f"detector config: max_regions is {self.max_regions}, more than proposals, {self.proposals}"
            )
        self.trunk = ResNetTrunk(
            self.stage_sizes[:3], self.width, self.strides, self.stride_in_1x1, self.caffe_pooling
        )
        self.head = ResidualStage(
            self.stage_sizes[3], self.head_width, self.head_stride, self.head_dilation, self.stride_in_1x1
        )
        anchors = len(self.anchor_sizes) * len(self.anchor_ratios)
        self.rpn = Convolution(self.rpn_width, 3, use_bias=True)
        small = nn.initializers.normal(0.01)
        self.rpn_objectness = nn.Dense(anchors, kernel_init=small)
        self.rpn_box = nn.Dense(4 * anchors, kernel_init=small)
        self.classifier = nn.Dense(self.num_classes + 1, kernel_init=small)
        self.box = nn.Dense(4 * self.num_classes, kernel_init=nn.initializers.normal(0.001))
        if self.num_attributes:
            self.class_embedding = nn.Embed(self.num_classes + 1, self.feature_size // 8)
            self.attribute_hidden = nn.Dense(self.feature_size // 4)
            self.attributes = nn.Dense(self.num_attributes + 1, kernel_init=small)

    @property
    def feature_size(self) -> int:
        return EXPANSION * self.head_width

    @property
    def stride(self) -> int:
        """Pixels a cell of the C4 map."""
        stride = 4
        for s in self.strides:
            stride *= s
        return stride

    def anchors(self, height: int, width: int):
        """Anchors [N, 4] of a map of height x width cells."""
        sizes, ratios = self.anchor_sizes, self.anchor_ratios
        return box_ops.anchor_grid(height, width, self.stride, sizes, ratios, self.anchor_offset)

    def cells(self, sizes: jax.Array) -> jax.Array:
        """(height, width) in pixels, [B, 2] -> rows and columns i32 [B, 2] of the map that they cover."""
        return self.trunk.cells(jnp.asarray(sizes).astype(jnp.int32))

    def feature_map(self, images: jax.Array, sizes: jax.Array | None = None) -> jax.Array:
        """uint8 [B, H, W, 3] -> C4 map [B, H / stride, W / stride, 16 * width], zero beyond each picture."""
        wide = jnp.promote_types(self.dtype, jnp.float32)
        mean, std = jnp.array(self.pixel_mean, wide), jnp.array(self.pixel_std, wide)
        x = ((images.astype(wide) - mean) / std).astype(self.dtype)
        if sizes is None:
            return self.trunk(x)
        return blank(self.trunk(x, jnp.asarray(sizes).astype(jnp.int32)), self.cells(sizes))

    def score_anchors(self, features: jax.Array) -> tuple[jax.Array, jax.Array]:
        """C4 map -> objectness logits [B, N] and box code [B, N, 4], both at least float32."""
        hidden = nn.relu(self.rpn(features))
        hidden = hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32))
        batch = hidden.shape[0]
        return self.rpn_objectness(hidden).reshape(batch, -1), self.rpn_box(hidden).reshape(batch, -1, 4)

    def propose(self, objectness, deltas, shape, sizes) -> tuple[jax.Array, jax.Array]:
        """Best proposals after suppression: boxes [B, P, 4] by falling score and which are real, [B, P].

        objectness [B, N], deltas [B, N, 4] on the anchors of a map of `shape` (rows, columns); sizes [B, 2]
        (height, width) in pixels. Anchors of cells beyond the picture make no proposal.
        """
        anchors = jnp.asarray(self.anchors(*shape))
        before = min(self.proposals_before_nms, anchors.shape[0])
        each = anchors.shape[0] // (shape[0] * shape[1])
        inside = blank(jnp.ones((len(objectness), *shape, each), jnp.int32), self.cells(sizes)) > 0

        def one(objectness, deltas, inside, size):
            scores, index = jax.lax.top_k(jnp.where(inside, objectness, -jnp.inf), before)
            boxes = box_ops.decode_boxes(deltas[index], anchors[index])
            boxes = box_ops.clip_boxes(boxes, size)
            side = jnp.min(boxes[:, 2:] - boxes[:, :2], axis=1)
            valid = inside[index] & (side >= self.min_box_size) & (side > 0)
            keep = box_ops.nms(boxes, scores, self.proposal_nms_threshold, valid)
            # The kept ones come first and stay in order of score.
            chosen = jnp.argsort(~keep, stable=True)[: self.proposals]
            missing = self.proposals - len(chosen)  # of a map with few anchors
            chosen = jnp.pad(chosen, (0, missing))
            keep = keep[chosen] & (jnp.arange(self.proposals) < self.proposals - missing)
            return jnp.where(keep[:, None], boxes[chosen], 0), keep

        return jax.vmap(one)(objectness, deltas, inside.reshape(objectness.shape), sizes)

    def pool(self, features: jax.Array, boxes: jax.Array, sizes: jax.Array) -> jax.Array:
        """C4 map [B, h, w, D], boxes [B, P, 4], picture sizes [B, 2] in pixels -> [B, P, bins, bins, D]."""
        cut = partial(roi_pool, stride=self.stride, bins=self.pooled_size)
        if self.pooling == "align":
            cut = partial(
                roi_align,
                stride=self.stride,
                bins=self.pooled_size,
                sampling_ratio=self.sampling_ratio,
                aligned=self.aligned,
            )
        return jax.vmap(cut)(features, boxes, self.cells(sizes))

    def describe(self, features: jax.Array, boxes: jax.Array, sizes: jax.Array) -> jax.Array:
        """Arguments as of `pool` -> the regions' features [B, P, Dv]: res5's mean, at least float32."""
        batch, count = boxes.shape[:2]
        cut = self.pool(features, boxes, sizes)
        found = self.head(cut.reshape(batch * count, *cut.shape[2:]))
        found = found.astype(jnp.promote_types(found.dtype, jnp.float32)).mean((1, 2))
        return found.reshape(batch, count, -1)

    def classify(self, pooled: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Features [B, P, Dv] -> logits [B, P, C + 1] and box code [B, P, C, 4]."""
        batch, count = pooled.shape[:2]
        deltas = self.box(pooled).reshape(batch, count, self.num_classes, 4)
        return self.classifier(pooled), deltas

    def score_attributes(self, pooled: jax.Array, classes: jax.Array) -> jax.Array:
        """Pooled features [B, R, Dv] and classes [B, R] (0 = background) -> logits [B, R, attributes + 1]."""
        hidden = jnp.concatenate([pooled, self.class_embedding(classes)], axis=-1)
        return self.attributes(nn.relu(self.attribute_hidden(hidden)))

    def __call__(self, images: jax.Array, boxes: jax.Array):
        """Every parameter once, on given regions [B, P, 4]: what `init` and calibration run."""
        features = self.feature_map(images)
        pooled = self.describe(features, boxes, jnp.full((len(images), 2), jnp.array(images.shape[1:3])))
        logits, deltas = self.classify(pooled)
        outputs = (*self.score_anchors(features), pooled, logits, deltas)
        if self.num_attributes:
            outputs += (self.score_attributes(pooled, logits.argmax(-1)),)
        return outputs


def from_config(config: Mapping) -> FasterRCNN:
    """The module that a config's `model` part (or a frozen encoder's config.json) describes."""
    return FasterRCNN(**{k: tuple(v) if isinstance(v, list | tuple) else v for k, v in config.items()})


def select_regions(model: FasterRCNN, proposals, valid, logits, deltas, size) -> dict[str, jax.Array]:
    """Which regions of one picture are given back: bottom-up attention's rule.

    Suppression runs class by class; a region's score is its best class probability among the classes
    in which it survived. Kept are those of at least `confidence_threshold`, but never fewer than
    `min_regions` nor more than `max_regions`, the best first. The class is the most probable one.

    Args:
      proposals [P, 4], valid [P], logits [P, C + 1], deltas [P, C, 4], size [2].

    Returns:
      index i32 [R] into the proposals, boxes [R, 4], classes i32 [R] from 1, scores [R], valid [R].
    """
    probabilities = jax.nn.softmax(logits)[:, 1:]
    best = probabilities.argmax(1)
    if model.refine_boxes:
        refined = box_ops.decode_boxes(deltas, proposals[:, None], model.box_weights)
        refined = box_ops.clip_boxes(refined, size)

        def survive(pair):
            boxes, scores = pair
            return box_ops.nms(boxes, scores, model.nms_threshold, valid)

        chunk = min(_CLASS_CHUNK, model.num_classes)
        per_class = (refined.swapaxes(0, 1), probabilities.T)
        survivors = jax.lax.map(survive, per_class, batch_size=chunk)
        boxes = jnp.take_along_axis(refined, best[:, None, None], axis=1)[:, 0]
    else:
        overlaps = box_ops.iou(proposals, proposals)
        suppress = partial(box_ops.keep_after_nms, overlaps, threshold=model.nms_threshold, valid=valid)
        survivors = jax.lax.map(suppress, probabilities.T, batch_size=min(_CLASS_CHUNK, model.num_classes))
        boxes = proposals
    scores = jnp.where(survivors.T, probabilities, 0).max(1)
    scores, index = jax.lax.top_k(jnp.where(valid, scores, -1), model.max_regions)
    rank = jnp.arange(model.max_regions)
    kept = valid[index] & ((scores >= model.confidence_threshold) | (rank < model.min_regions))
    return {
        "index": index,
        "boxes": jnp.where(kept[:, None], boxes[index], 0),
        "classes": jnp.where(kept, best[index] + 1, 0).astype(jnp.int32),
        "scores": jnp.where(kept, scores, 0),
        "valid": kept,
    }


def _parts(model: FasterRCNN, boxes: jax.Array) -> jax.Array:
    """Boxes [B, P, 4] -> [parts, B, p, 4], the last part filled up with empty ones."""
    batch, count = boxes.shape[:2]
    side = -(-model.pooled_size // model.head_stride)
    region = side**2 * model.feature_size * jnp.dtype(model.dtype).itemsize
    most = _HEAD_BYTES.get(jax.default_backend(), _HEAD_BYTES_ELSEWHERE)
    size = min(count, max(1, most // (batch * region)))
    parts = -(-count // size)
    boxes = jnp.pad(boxes, ((0, 0), (0, parts * size - count), (0, 0)))
    return boxes.reshape(batch, parts, size, 4).swapaxes(0, 1)


@partial(jax.jit, static_argnums=0)
def _detect(model: FasterRCNN, params, images, sizes):
    apply = partial(model.apply, {"params": params})
    features = apply(images, sizes, method="feature_map")
    objectness, deltas = apply(features, method="score_anchors")
    shape = features.shape[1:3]
    proposals, valid = apply(objectness, deltas, shape, sizes, method="propose")
    describe = partial(apply, method="describe")
    parts = _parts(model, proposals)
    pooled = jax.lax.map(lambda boxes: describe(features, boxes, sizes), parts)
    pooled = pooled.swapaxes(0, 1).reshape(len(images), -1, model.feature_size)[:, : proposals.shape[1]]
    logits, deltas = apply(pooled, method="classify")
    regions = jax.vmap(partial(select_regions, model))(proposals, valid, logits, deltas, sizes)
    index = regions.pop("index")[..., None]
    pooled = jnp.take_along_axis(pooled, index, axis=1)
    regions["features"] = jnp.where(regions["valid"][..., None], pooled, 0)
    if model.num_attributes:
        logits = apply(pooled, regions["classes"], method="score_attributes")
        regions["attributes"] = jnp.where(regions["valid"], logits[..., 1:].argmax(-1) + 1, 0)
    return regions


def detect(params, images, config: Mapping, sizes=None) -> dict[str, jax.Array]:
    """Regions of pictures; each picture's answer is independent of the rest of the batch.

    Args:
      params: of `FasterRCNN`.
      images: uint8 [B, H, W, 3].
      config: the `model` part of a detector's config.
      sizes: [B, 2] (height, width) in pixels of the real part of each picture; None when all of it is.

    Returns:
      features f32 [B, R, Dv] (pooled res5), boxes f32 [B, R, 4] (x1, y1, x2, y2 in pixels), classes i32
      [B, R] from 1, scores f32 [B, R], valid bool [B, R]; with an attribute head also attributes i32
      [B, R] from 1. R = max_regions; the best region comes first and invalid rows are zero.
    """
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != jnp.uint8:
        raise ValueError(f"detect: images must be uint8 [B, H, W, 3], found {images.dtype} {images.shape}")
    if sizes is None:
        sizes = jnp.tile(jnp.array(images.shape[1:3]), (images.shape[0], 1))
    return _detect(from_config(config), params, images, jnp.asarray(sizes))
