"""Arrays that detectors elsewhere wrote, checked and brought into the form of `Regions`."""

from collections.abc import Mapping

import numpy as np

from opt_jax.data.triplet import Regions, UnusableSampleError

MAX_REGIONS = 1000
MAX_WIDTH = 16_384  # numbers of one region
MAX_SIDE = 1_000_000  # pixels
MAX_CLASS = 1_000_000
OUTSIDE = 0.05  # of the picture, that boxes may be beyond its edges: detectors round, and store 16 bits


def regions_of(arrays: Mapping[str, np.ndarray], sample_id: str) -> Regions:
    """Regions, best first, from `features` [R, Dv] and

      boxes [R, 4] in pixels with width [] and height [] of the picture, or relative_boxes [R, 4 or more];
      scores [R], or 1 where absent;
      classes [R], from 0, or soft_labels [R, C + 1], 0 for the background; the first class where absent.

    Where boxes are relative the picture counts as one of 1 x 1 pixels. Edges are taken as they are: detectors
    that count the last pixel in (x2 at most width - 1) give boxes one pixel smaller.

    Raises UnusableSampleError, naming the array: absent, of another shape, not finite, out of its range.
    """

    def refuse(reason: str):
        raise UnusableSampleError(sample_id, "features", reason)

    def numbers(name: str, *shape: int | None, dtype=np.float32) -> np.ndarray:
        if name not in arrays:
            refuse(f"lack the array {name}")
        array, known = arrays[name], [size for size in shape if size is not None]
        if (
            array.ndim != len(shape)
            or array.dtype.kind not in "fiu"
            or known != list(array.shape)[: len(known)]
        ):
            refuse(f"have {name} of {array.dtype} {list(array.shape)}, expected numbers {list(shape)}")
        with np.errstate(all="ignore"):
            array = array.astype(dtype)
        if not np.isfinite(array).all():
            refuse(f"have {name} that are not finite numbers")
        return array

    features = numbers("features", None, None)
    count, size = features.shape
    if not (1 <= count <= MAX_REGIONS and 1 <= size <= MAX_WIDTH):
        refuse(f"are {count} regions of {size} numbers, not 1 to {MAX_REGIONS} of 1 to {MAX_WIDTH}")
    width = height = 1
    if "boxes" in arrays or "relative_boxes" not in arrays:
        boxes = numbers("boxes", count, 4)
        width, height = int(numbers("width", dtype=np.float64)), int(numbers("height", dtype=np.float64))
        if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE):
            refuse(f"are of a picture of {width} x {height} pixels")
    else:
        boxes = numbers("relative_boxes", count, None)[:, :4]
        if boxes.shape[1] < 4:
            refuse(f"have relative boxes of {boxes.shape[1]} numbers, expected 4 or more")
    sides = np.array([width, height, width, height], np.float32)
    relative = boxes / sides
    if relative.min() < -OUTSIDE or relative.max() > 1 + OUTSIDE:
        refuse(f"have boxes beyond the picture of {width} x {height}")
    if (boxes[:, 2:] < boxes[:, :2]).any():
        refuse("have boxes whose right or bottom edge comes before the other; expected x1 y1 x2 y2")
    scores = numbers("scores", count) if "scores" in arrays else np.ones(count, np.float32)
    classes = np.zeros(count)
    if "classes" in arrays:
        classes = numbers("classes", count, dtype=np.float64)
        if classes.min() < 0 or classes.max() > MAX_CLASS:
            refuse(f"have classes from {classes.min():g} to {classes.max():g}, not 0 to {MAX_CLASS}")
    elif "soft_labels" in arrays:
        soft = numbers("soft_labels", count, None)
        if soft.shape[1] < 2:
            refuse("have soft_labels of the background alone")
        classes = soft[:, 1:].argmax(axis=1)
    best = np.argsort(-scores, kind="stable")
    boxes, classes = np.clip(boxes, 0, sides), classes.astype(np.int32) + 1
    return Regions(features[best], boxes[best], classes[best], scores[best], width, height)
