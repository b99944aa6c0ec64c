"""Pictures as the discrete VAE takes them: square, of one size, in an order given by the step."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from opt_jax.data.triplet import Source, SourceError, usable

MEMORY = 1 << 30  # bytes of small pictures kept, so that later epochs decode none of them again
GREY = 127


def fit_square(image: np.ndarray, size: int) -> np.ndarray:
    """A picture uint8 [h, w, 3] as uint8 [size, size, 3].

    Its longer side becomes `size`, by averaging areas where it shrinks; a picture that is not square stands
    between grey bars (it is not squeezed).
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"a picture must be uint8 [h, w, 3], found {image.dtype} {list(image.shape)}")
    top, left, height, width = placed(image.shape, size)
    if (height, width) != image.shape[:2]:
        method = Image.Resampling.BOX if max(image.shape[:2]) > size else Image.Resampling.BILINEAR
        image = np.asarray(Image.fromarray(image).resize((width, height), method))
    square = np.full((size, size, 3), GREY, np.uint8)
    square[top : top + height, left : left + width] = image
    return square


def placed(shape: tuple[int, ...], size: int) -> tuple[int, int, int, int]:
    """Where a picture of `shape` (h, w, ...) lies in its square: (top, left, height, width) in pixels."""
    longest = max(shape[:2])
    height, width = (max(1, round(side * size / longest)) for side in shape[:2])
    return (size - height) // 2, (size - width) // 2, height, width


def read_picture(source: Source, index: int, size: int) -> np.ndarray | None:
    """The picture of sample `index` as uint8 [size, size, 3]; None where it has none that can be used."""
    sample = usable(source, index, audio=False)
    return None if sample is None or sample.image is None else fit_square(sample.image, size)


class PictureBatches:
    """{"images": uint8 [B, size, size, 3]} without end.

    Every epoch is a permutation, drawn from (seed, epoch), of the samples with pictures, without its
    remainder, so a batch is a function of the step. In the place of a picture that cannot be used stands the
    next one that can.
    """

    def __init__(self, source: Source, batch_size: int, size: int, seed: int):
        self._rows = source.rows_with("image")
        if len(self._rows) < batch_size:
            raise SourceError(
                f"the dVAE is trained on pictures, in batches of {batch_size}; {len(self._rows)} of"
                f" {len(source)} samples have one"
            )
        self._source, self._batch_size, self._size, self._seed = source, batch_size, size, seed
        self._kept: dict[int, np.ndarray] = {}

    def from_step(self, step: int) -> Iterator[dict[str, np.ndarray]]:
        per_epoch = len(self._rows) // self._batch_size
        epoch, position = divmod(step, per_epoch)
        while True:
            order = np.random.default_rng((self._seed, epoch)).permutation(len(self._rows))
            for number in range(position, per_epoch):
                places = order[number * self._batch_size : (number + 1) * self._batch_size]
                yield {"images": np.stack([self._picture(int(place)) for place in places])}
            epoch, position = epoch + 1, 0

    def _picture(self, place: int) -> np.ndarray:
        if place in self._kept:
            return self._kept[place]
        count = len(self._rows)
        for other in itertools.chain(range(place, count), range(place)):
            picture = read_picture(self._source, int(self._rows[other]), self._size)
            if picture is not None:
                break
        else:
            raise SourceError(f"none of the {count} pictures can be used, on which the dVAE is trained")
        if (len(self._kept) + 1) * picture.nbytes <= MEMORY:
            self._kept[place] = picture
        return picture


def write_before_after(path: Path, before: np.ndarray, after: np.ndarray, columns: int = 8, zoom: int = 2):
    """A PNG of pictures uint8 [n, h, w, 3], each row of originals above a row of their reconstructions."""
    rows = []
    for start in range(0, len(before), columns):
        for images in (before, after):
            row = np.zeros((columns, *before.shape[1:]), np.uint8)
            row[: len(images[start : start + columns])] = images[start : start + columns]
            rows.append(np.concatenate(list(row), axis=1))
    sheet = np.concatenate(rows).repeat(zoom, 0).repeat(zoom, 1)
    Image.fromarray(sheet).save(path)
