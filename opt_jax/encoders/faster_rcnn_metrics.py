"""Average precision and class accuracy of detections: pure numpy."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Regions(NamedTuple):
    """One picture: boxes [n, 4] (x1, y1, x2, y2), classes [n] from 1, and for detections scores [n]."""

    boxes: np.ndarray
    classes: np.ndarray
    scores: np.ndarray | None = None


def overlaps(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersection over union [M, N] of boxes [M, 4] and [N, 4]."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    common = np.prod(np.maximum(high - low, 0), axis=-1)
    areas = [np.prod(np.maximum(b[:, 2:] - b[:, :2], 0), axis=-1) for b in (first, second)]
    return common / np.maximum(areas[0][:, None] + areas[1][None] - common, 1e-12)


def average_precision(
    found: Sequence[Regions], truth: Sequence[Regions], threshold: float = 0.5
) -> tuple[float, dict[int, float]]:
    """Area under the precision-recall curve (all points), class by class, and its mean.

    Detections go by falling score over all pictures; each takes the object of its class that it overlaps
    most, if by at least `threshold` and if no better detection took it; else it is false.

    Returns:
      (mean over the classes that occur in `truth`, {class: average precision}).

    Raises:
      ValueError: different numbers of pictures, or no object at all.
    """
    if len(found) != len(truth):
        raise ValueError(f"average precision: detections of {len(found)} pictures, objects of {len(truth)}")
    present = sorted({int(c) for regions in truth for c in regions.classes})
    if not present:
        raise ValueError("average precision: the truth holds no object")
    scores = {c: _one_class(found, truth, c, threshold) for c in present}
    return float(np.mean(list(scores.values()))), scores


def _one_class(found, truth, wanted, threshold):
    marks = []  # (score, is it right) of every detection
    objects = 0
    for detected, actual in zip(found, truth, strict=True):
        mine, theirs = detected.classes == wanted, actual.classes == wanted
        objects += int(theirs.sum())
        match = overlaps(detected.boxes[mine], actual.boxes[theirs])
        taken = np.zeros(match.shape[1], bool)
        scores = detected.scores[mine]
        for row in np.argsort(-scores, kind="stable"):
            right = False
            if match.shape[1]:
                best = int(match[row].argmax())
                right = bool(match[row, best] >= threshold and not taken[best])
                taken[best] |= right
            marks.append((float(scores[row]), right))
    if not marks:
        return 0.0
    marks.sort(key=lambda mark: -mark[0])
    right = np.cumsum([mark[1] for mark in marks])
    precision = right / np.arange(1, len(marks) + 1)
    recall = right / objects
    # Precision at a recall is the best one at that recall or beyond.
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * envelope))


def recall_and_class_accuracy(
    found: Sequence[Regions], truth: Sequence[Regions], threshold: float = 0.5
) -> tuple[float, float]:
    """Share of objects that some region overlaps by `threshold`, and how many of these have the right class.

    The class is that of the region which overlaps the object most. Accuracy is NaN when nothing is found.
    """
    objects = covered = right = 0
    for detected, actual in zip(found, truth, strict=True):
        objects += len(actual.classes)
        if not len(detected.classes) or not len(actual.classes):
            continue
        match = overlaps(actual.boxes, detected.boxes)
        best = match.argmax(1)
        hit = match.max(1) >= threshold
        covered += int(hit.sum())
        right += int((hit & (detected.classes[best] == actual.classes)).sum())
    return covered / max(objects, 1), right / covered if covered else float("nan")
