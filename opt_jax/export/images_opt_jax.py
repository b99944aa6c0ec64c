"""Pictures as the frozen encoders take them: decoded, resized, and boxes relative to them."""

import os
import warnings
from pathlib import Path

import numpy as np

GREY = 127
MIN_SIDE = 8  # pixels; less holds nothing to see
MAX_PIXELS = 40_000_000
THINNEST = 16  # pixels of a resized picture's shorter side
KNOWN = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
MODES = ("1", "L", "LA", "La", "RGB", "RGBA", "RGBX", "RGBa", "YCbCr")  # 8 bits a channel, no palette


def pillow():
    """The package PIL, of use to pictures alone: texts and recordings do without it.

    Raises: ValueError: it is not installed.
    """
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError as error:
        raise ValueError("pictures need the package Pillow, which is not installed") from error
    return PIL


def as_array(picture) -> np.ndarray:
    """uint8 [H, W, 3] of a file's name, a PIL image (what is transparent becomes white), or such an array.

    A file is turned as its EXIF says. Sizes and colours are looked at before anything is decoded.

    Raises: ValueError: it is something else, damaged, of a side under MIN_SIDE or over MAX_PIXELS; or it has
      a palette, print colours or more than 8 bits a channel: what these show depends on more than numbers.
    """
    pil = pillow()
    if isinstance(picture, str | os.PathLike):
        return from_file(picture)
    if isinstance(picture, pil.Image.Image):
        return from_pillow(picture)
    if not hasattr(picture, "shape"):
        raise ValueError(
            f"a picture is a file's name, a PIL image or uint8 [H, W, 3], and not {type(picture).__name__}"
        )
    picture = np.asarray(picture)
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"the picture is {picture.dtype} {list(picture.shape)}, expected uint8 [H, W, 3]")
    check_size(*picture.shape[:2])
    return picture


def from_file(name) -> np.ndarray:
    """`as_array` of a file; errors name it."""
    pil = pillow()
    if not Path(name).is_file():
        raise ValueError(f"{name}: there is no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pil.Image.DecompressionBombWarning)  # MAX_PIXELS is lower
            file = pil.Image.open(name, formats=KNOWN)
        with file:
            check_colours(file)
            return from_pillow(pil.ImageOps.exif_transpose(file))
    except pil.UnidentifiedImageError as error:
        raise ValueError(f"{name} is no picture: none of {', '.join(KNOWN)}") from error
    except Exception as error:  # decoders raise all kinds on damaged files
        raise ValueError(f"{name} cannot be used: {error}") from error


def from_pillow(picture) -> np.ndarray:
    """`as_array` of a PIL image."""
    check_colours(picture)
    if picture.has_transparency_data:
        picture, pil = picture.convert("RGBA"), pillow()
        picture = pil.Image.alpha_composite(pil.Image.new("RGBA", picture.size, "white"), picture)
    return np.asarray(picture.convert("RGB"))


def check_colours(picture) -> None:
    """Raises ValueError unless the size, mode and bits of a PIL image, decoded or not, can be used."""
    check_size(picture.height, picture.width)
    # Pillow cuts colours of 16 bits to 8 as it decodes them; until then `tile` tells.
    deep = picture.format in ("PNG", "TIFF") and ";16" in str(getattr(picture, "tile", ""))
    if deep or picture.mode not in MODES:
        found = "16 bits a channel" if deep else f"the mode {picture.mode}"
        raise ValueError(f"the picture has {found}; save it as RGB of 8 bits")


def check_size(height: int, width: int) -> None:
    if min(height, width) < MIN_SIDE:
        raise ValueError(f"the picture has [{height}, {width}] pixels; a side needs {MIN_SIDE}")
    if height * width > MAX_PIXELS:
        most = f"{MAX_PIXELS // 1_000_000} million"
        raise ValueError(f"the picture has [{height}, {width}] pixels, more than {most}; make it smaller")


def fit_square(image: np.ndarray, size: int) -> np.ndarray:
    """A picture uint8 [H, W, 3] as uint8 [size, size, 3], between grey bars where it is not square.

    Its longer side becomes `size`, by averaging areas where it shrinks.
    """
    top, left, height, width = placed(image.shape, size)
    if (height, width) != image.shape[:2]:
        pil = pillow()
        ways = pil.Image.Resampling
        method = ways.BOX if max(image.shape[:2]) > size else ways.BILINEAR
        image = np.asarray(pil.Image.fromarray(image).resize((width, height), method))
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
    pil = pillow()
    return np.asarray(pil.Image.fromarray(image).resize((width, height), pil.Image.Resampling.BILINEAR))


def with_sides(corners: np.ndarray) -> np.ndarray:
    """Boxes x1, y1, x2, y2 [R, 4] with width, height and area: float32 [R, 7]."""
    x1, y1, x2, y2 = corners.T
    return np.stack([x1, y1, x2, y2, x2 - x1, y2 - y1, (x2 - x1) * (y2 - y1)], 1).astype(np.float32)


def relative_boxes(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Boxes [R, 4] in pixels to float32 [R, 7], relative to the picture (UNITER, arXiv 1909.11740)."""
    return with_sides(boxes / np.array([width, height, width, height], np.float32))
