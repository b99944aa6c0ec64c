"""Pictures and boxes as the detector takes them: one size, padded truth, an order given by the step."""

from collections.abc import Iterator

import numpy as np
from PIL import Image

from opt_jax.data.triplet import Source, Triplet


def scale(shape, min_side: int, max_side: int) -> float:
    """The factor that makes the shorter side of a picture [h, w, ...] `min_side`, or its longer side
    `max_side` where that one would get longer; 1 for min_side 0."""
    return min(min_side / min(shape[:2]), max_side / max(shape[:2])) if min_side else 1.0


def resized(image: np.ndarray, min_side: int, max_side: int) -> tuple[np.ndarray, float]:
    """A picture uint8 [h, w, 3] resized by `scale`, and that factor.

    Faster R-CNN, arXiv 1506.01497, section 3.3; bilinear, and two steps of scaling in the order of
    detectron2, whose rounding it shares.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"the picture must be uint8 [h, w, 3], found {image.dtype} {list(image.shape)}")
    if not min_side:
        return image, 1.0
    factor = min_side / min(image.shape[:2])
    sides = [n * factor if n > min(image.shape[:2]) else float(min_side) for n in image.shape[:2]]
    if max(sides) > max_side:
        factor = max_side / max(sides)
        sides = [side * factor for side in sides]
    height, width = (max(1, int(side + 0.5)) for side in sides)
    if (height, width) != image.shape[:2]:
        small = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(small), scale(image.shape, min_side, max_side)
    return image, 1.0


def in_corner(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """The picture in the upper left corner of a black one: uint8 [h, w, 3] -> [height, width, 3]."""
    canvas = np.zeros((height, width, 3), np.uint8)
    canvas[: image.shape[0], : image.shape[1]] = image
    return canvas


def read_example(source: Source, index: int) -> Triplet:
    """Sample `index` with its picture, boxes and classes; leaves the sound alone where the source can."""
    read = getattr(source, "read", None)
    sample = source[index] if read is None else read(index, audio=False)
    for field in ("image", "boxes", "classes"):
        if getattr(sample, field) is None:
            raise ValueError(f"sample {sample.id!r} has no {field}, which training a detector needs")
    return sample


def detector_batch(
    samples: list[Triplet], min_side: int, max_side: int, max_objects: int
) -> dict[str, np.ndarray]:
    """images u8 [B, S, S, 3], S = max_side, boxes f32 [B, G, 4], classes i32 [B, G] (0 = padding), sizes
    f32 [B, 2]."""
    count = len(samples)
    batch = {
        "images": np.zeros((count, max_side, max_side, 3), np.uint8),
        "boxes": np.zeros((count, max_objects, 4), np.float32),
        "classes": np.zeros((count, max_objects), np.int32),
        "sizes": np.zeros((count, 2), np.float32),
    }
    for row, sample in enumerate(samples):
        objects = len(sample.boxes)
        if objects > max_objects:
            raise ValueError(f"sample {sample.id!r} has {objects} boxes, but max_objects is {max_objects}")
        image, factor = resized(sample.image, min_side, max_side)
        batch["images"][row], batch["sizes"][row] = in_corner(image, max_side, max_side), image.shape[:2]
        batch["boxes"][row, :objects] = sample.boxes * factor
        batch["classes"][row, :objects] = sample.classes
    return batch


class DetectorBatches:
    """Training batches; every epoch is a permutation drawn from (seed, epoch), without its remainder."""

    def __init__(self, source: Source, batch_size: int, sizes: tuple[int, int, int], seed: int):
        """`sizes`: min_side, max_side and max_objects, see `detector_batch`."""
        if len(source) < batch_size:
            raise ValueError(f"the source has {len(source)} samples, fewer than a batch of {batch_size}")
        self._source, self._batch_size, self._sizes, self._seed = source, batch_size, sizes, seed

    def from_step(self, step: int) -> Iterator[dict[str, np.ndarray]]:
        per_epoch = len(self._source) // self._batch_size
        epoch, position = divmod(step, per_epoch)
        while True:
            order = np.random.default_rng((self._seed, epoch)).permutation(len(self._source))
            for number in range(position, per_epoch):
                rows = order[number * self._batch_size : (number + 1) * self._batch_size]
                yield detector_batch([read_example(self._source, int(i)) for i in rows], *self._sizes)
            epoch, position = epoch + 1, 0
