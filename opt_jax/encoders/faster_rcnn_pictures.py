"""Pictures and boxes as the detector takes them: one size, padded truth, an order given by the step."""

from collections.abc import Iterator

import numpy as np
from PIL import Image

from opt_jax.data.triplet import Source, Triplet


def letterbox(image: np.ndarray, side: int) -> tuple[np.ndarray, tuple[int, int], float]:
    """A picture in the upper left corner of a square one, shrunk or enlarged to fit, its shape kept.

    Args:
      image: uint8 [h, w, 3]. side: of the square, in pixels.

    Returns:
      uint8 [side, side, 3] (black where there is no picture), (height, width) of the real part, and the
      factor from old to new pixels.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"letterbox: the picture must be uint8 [h, w, 3], found {image.dtype} {image.shape}")
    scale = side / max(image.shape[:2])
    height, width = (max(1, round(n * scale)) for n in image.shape[:2])
    if (height, width) != image.shape[:2]:
        image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    square = np.zeros((side, side, 3), np.uint8)
    square[:height, :width] = image
    return square, (height, width), scale


def read_example(source: Source, index: int) -> Triplet:
    """Sample `index` with its picture, boxes and classes; leaves the sound alone where the source can."""
    read = getattr(source, "read", None)
    sample = source[index] if read is None else read(index, audio=False)
    for field in ("image", "boxes", "classes"):
        if getattr(sample, field) is None:
            raise ValueError(f"sample {sample.id!r} has no {field}, which training a detector needs")
    return sample


def detector_batch(samples: list[Triplet], image_size: int, max_objects: int) -> dict[str, np.ndarray]:
    """images u8 [B, S, S, 3], boxes f32 [B, G, 4], classes i32 [B, G] (0 = padding), sizes f32 [B, 2]."""
    count = len(samples)
    batch = {
        "images": np.zeros((count, image_size, image_size, 3), np.uint8),
        "boxes": np.zeros((count, max_objects, 4), np.float32),
        "classes": np.zeros((count, max_objects), np.int32),
        "sizes": np.zeros((count, 2), np.float32),
    }
    for row, sample in enumerate(samples):
        objects = len(sample.boxes)
        if objects > max_objects:
            raise ValueError(f"sample {sample.id!r} has {objects} boxes, but max_objects is {max_objects}")
        batch["images"][row], batch["sizes"][row], scale = letterbox(sample.image, image_size)
        batch["boxes"][row, :objects] = sample.boxes * scale
        batch["classes"][row, :objects] = sample.classes
    return batch


class DetectorBatches:
    """Training batches; every epoch is a permutation drawn from (seed, epoch), without its remainder."""

    def __init__(self, source: Source, batch_size: int, image_size: int, max_objects: int, seed: int):
        if len(source) < batch_size:
            raise ValueError(f"the source has {len(source)} samples, fewer than a batch of {batch_size}")
        self._source, self._batch_size, self._seed = source, batch_size, seed
        self._sizes = (image_size, max_objects)

    def from_step(self, step: int) -> Iterator[dict[str, np.ndarray]]:
        per_epoch = len(self._source) // self._batch_size
        epoch, position = divmod(step, per_epoch)
        while True:
            order = np.random.default_rng((self._seed, epoch)).permutation(len(self._source))
            for number in range(position, per_epoch):
                rows = order[number * self._batch_size : (number + 1) * self._batch_size]
                yield detector_batch([read_example(self._source, int(i)) for i in rows], *self._sizes)
            epoch, position = epoch + 1, 0
