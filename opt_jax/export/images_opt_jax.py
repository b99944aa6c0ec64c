"""Pictures as the frozen encoders take them: decoded, resized, and boxes relative to them."""

import os

import numpy as np
from PIL import Image, ImageOps

GREY = 127
MIN_SIDE = 8  # pixels; less holds nothing to see
THINNEST = 16  # pixels of a resized picture's shorter side


def as_array(picture) -> np.ndarray:
    """uint8 [H, W, 3] of a file's name, a PIL image (what is transparent becomes white), or such an array.

    Raises: ValueError: it is something else, or too small.
    """
    if isinstance(picture, str | os.PathLike):
        with Image.open(picture) as file:
            picture = ImageOps.exif_transpose(file)
    if isinstance(picture, Image.Image):
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        picture = np.asarray(picture.convert("RGB"))
    picture = np.asarray(picture)
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"the picture is {picture.dtype} {list(picture.shape)}, expected uint8 [H, W, 3]")
    if min(picture.shape[:2]) < MIN_SIDE:
        raise ValueError(f"the picture has {list(picture.shape[:2])} pixels; a side needs {MIN_SIDE}")
    return picture


def fit_square(image: np.ndarray, size: int) -> np.ndarray:
    """A picture uint8 [H, W, 3] as uint8 [size, size, 3], between grey bars where it is not square.

    Its longer side becomes `size`, by averaging areas where it shrinks.
    """
    top, left, height, width = placed(image.shape, size)
    if (height, width) != image.shape[:2]:
        method = Image.Resampling.BOX if max(image.shape[:2]) > size else Image.Resampling.BILINEAR
        image = np.asarray(Image.fromarray(image).resize((width, height), method))
    square = np.full((size, size, 3), GREY, np.uint8)
    square[top : top + height, left : left + width] = image
    return square


def placed(shape: tuple[int, ...], size: int) -> tuple[int, int, int, int]:
    """Where a picture of `shape` (H, W, ...) lies in its square: (top, left, height, width) in pixels."""
    longest = max(shape[:2])
    height, width = (max(1, round(side * size / longest)) for side in shape[:2])
    return (size - height) // 2, (size - width) // 2, height, width


def resized(image: np.ndarray, min_side: int, max_side: int) -> np.ndarray:
    """A picture uint8 [H, W, 3] with its shorter side made `min_side`, or its longer side `max_side` where
    that one would get longer; as it is for min_side 0.

    Bilinear (Faster R-CNN, arXiv 1506.01497, section 3.3).

    Raises: ValueError: the result would be too thin.
    """
    if not min_side:
        return image
    shortest = min(image.shape[:2])
    sides = [n * (min_side / shortest) if n > shortest else float(min_side) for n in image.shape[:2]]
    if max(sides) > max_side:
        sides = [side * (max_side / max(sides)) for side in sides]
    if min(sides) < THINNEST:
        raise ValueError(
            f"a picture of {list(image.shape[:2])} pixels is too thin once it is resized to {max_side}"
        )
    height, width = (max(1, int(side + 0.5)) for side in sides)
    if (height, width) == image.shape[:2]:
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def with_sides(corners: np.ndarray) -> np.ndarray:
    """Boxes x1, y1, x2, y2 [R, 4] with width, height and area: float32 [R, 7]."""
    x1, y1, x2, y2 = corners.T
    return np.stack([x1, y1, x2, y2, x2 - x1, y2 - y1, (x2 - x1) * (y2 - y1)], 1).astype(np.float32)


def relative_boxes(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Boxes [R, 4] in pixels to float32 [R, 7], relative to the picture (UNITER, arXiv 1909.11740)."""
    return with_sides(boxes / np.array([width, height, width, height], np.float32))
