"""Open Images: pictures with image-level labels (storage.googleapis.com/openimages, V1 to V7).

    open_images_labels:oidv6-{split}-human-imagelabels.csv,images=oid/{split},descriptions=class-descriptions.csv

The list says ImageID,Source,LabelName,Confidence, one label a line: of labels verified by people 1 is there
and 0 is not there, a machine's have fractions. The descriptions, LabelName,DisplayName, name the classes.
"""

import hashlib
import re
import reprlib
import warnings
from array import array
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from opt_jax.data.lines import Lines
from opt_jax.data.row import Row
from opt_jax.data.rows import RowSource
from opt_jax.data.triplet import SourceError, UnusableSampleError
from opt_jax.metrics_log import progress

COLUMNS = ("ImageID", "LabelName", "Confidence")
IMAGE_ID = re.compile(b"[0-9a-f]{16}")
MAX_LINE = 1 << 16  # bytes
MAX_BAD = 100_000  # lines, each of which is a row that cannot be used
SHOWN = 100 << 20  # bytes from which on reading the list shows its progress


class OpenImagesLabels(RowSource):
    """The pictures of a list, in the order of their ids, with the labels that are there as class names.

    A picture of which nothing verified is there has no labels. Classes of one display name are one class; a
    label of a class that the descriptions lack is left out, with a warning. A line that cannot be read is an
    unusable row, after all pictures. While the list is read a line takes up to 50 bytes of memory, in any
    order of the lines; 4 bytes a label and 16 a picture stay.

    Args:
      path: the list. images: folder of the pictures, ImageID.jpg; they may also lie in its sub folders train,
        validation and test. descriptions: class-descriptions.csv, with or without a header. confidence: from
        which on a label is there, above 0 and at most 1.
    """

    image_subfolders = ("train", "validation", "test")

    def __init__(self, path, images, descriptions, confidence=1.0, class_names=None):
        self.path, threshold = Path(path), _threshold(confidence)
        self._names, numbers, described = _classes(descriptions)
        try:
            with open(self.path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                file.seek(0)
                header = file.readline(MAX_LINE)
                lines = iter(lambda: file.readline(MAX_LINE), b"")
                if self.path.stat().st_size >= SHOWN:
                    lines = progress(lines, f"{self.path.name}: lines")
                self._read(lines, header, numbers, threshold)
        except OSError as error:
            raise SourceError(f"{self.path} cannot be read: {error.strerror}") from error
        identity = {"sha256": digest, "descriptions_sha256": described, "confidence": threshold}
        super().__init__("open_images_labels", {"image": images}, identity, class_names)

    def _read(self, lines: Iterable[bytes], header: bytes, numbers: dict[bytes, int], threshold: float):
        columns = _columns(header, self.path)
        width, places = len(columns), [columns.index(name) for name in COLUMNS]
        pictures, owners, labels = array("Q"), array("Q"), array("i")
        self._bad: list[tuple[int, str]] = []  # number of the line in the file from 1, reason
        last, picture, unnamed, example = b"", 0, 0, b""
        for line_number, line in enumerate(lines, 2):
            cells = line.rstrip(b"\r\n").split(b",")
            if cells == [b""]:
                continue
            if len(cells) != width:
                self._set_aside(line_number, f"has {len(cells)} cells, expected {width}: {','.join(columns)}")
                continue
            image, label, confidence = (cells[place] for place in places)
            certain = _confidence(confidence)
            if not 0 <= certain <= 1:
                self._set_aside(line_number, f"has the Confidence {_shown(confidence)}, expected 0 to 1")
                continue
            if image != last:
                if not IMAGE_ID.fullmatch(image):
                    reason = f"has the ImageID {_shown(image)}, expected 16 of 0-9 and a-f"
                    self._set_aside(line_number, reason)
                    continue
                last, picture = image, int(image, 16)
                pictures.append(picture)
            if certain >= threshold:
                if (number := numbers.get(label)) is None:
                    unnamed, example = unnamed + 1, label
                else:
                    owners.append(picture)
                    labels.append(number)
        self._check(len(pictures), len(labels), unnamed, example)
        self._ids = np.unique(np.asarray(pictures))
        rows = np.searchsorted(self._ids, np.asarray(owners))
        self._labels = np.asarray(labels)[np.argsort(rows, kind="stable")]
        self._ends = np.cumsum(np.bincount(rows, minlength=len(self._ids)))

    def _set_aside(self, line_number: int, reason: str) -> None:
        self._bad.append((line_number, reason))
        if len(self._bad) > MAX_BAD:
            raise SourceError(
                f"{self.path} is no list of labels: {len(self._bad)} lines cannot be read, the first of them,"
                f" line {self._bad[0][0]}, {self._bad[0][1]}"
            )

    def _check(self, pictures: int, labels: int, unnamed: int, example: bytes) -> None:
        if not pictures:
            raise SourceError(f"{self.path} names no pictures")
        if unnamed:
            told = f"{unnamed} of {labels + unnamed} labels, such as {_shown(example)}"
            if not labels:
                raise SourceError(f"{self.path}: the descriptions name none of its classes: {told}")
            warnings.warn(f"{self.path}: left out, as the descriptions lack them: {told}", stacklevel=4)

    def __len__(self) -> int:
        return len(self._ids) + len(self._bad)

    def row(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {self.path}: there are {len(self)}")
        if index >= len(self._ids):
            line_number, reason = self._bad[index - len(self._ids)]
            raise UnusableSampleError(f"{self.path.name}, line {line_number}", "row", reason)
        image = f"{int(self._ids[index]):016x}"
        start = self._ends[index - 1] if index else 0
        labels = {self._names[number] for number in self._labels[start : self._ends[index]]}
        return Row(image, f"{image}.jpg", labels=tuple(sorted(labels)))


def _threshold(confidence) -> float:
    try:
        threshold = float(confidence)
    except ValueError:
        threshold = 0.0
    if not 0 < threshold <= 1:
        raise SourceError(f"confidence={confidence}; expected a number above 0 and at most 1")
    return threshold


def _confidence(cell: bytes) -> float:
    try:
        return float(cell)
    except ValueError:
        return -1.0


def _shown(cell: bytes) -> str:
    return reprlib.repr(cell.decode(errors="backslashreplace"))


def _columns(header: bytes, path: Path) -> list[str]:
    columns = header.decode("utf-8-sig", "replace").strip().split(",")
    for name in COLUMNS:
        if columns.count(name) != 1:
            raise SourceError(f"{path}: its first row names no column {name}: {reprlib.repr(columns)}")
    return columns


def _classes(path) -> tuple[list[str], dict[bytes, int], str]:
    """Display names, the number of each LabelName in these, and the hash of the file.

    A header, as some versions have it, is taken for a class: one that no picture has.
    """
    lines, names, numbers = Lines(path, quoted=True), {}, {}
    for index in range(len(lines)):
        try:
            cells = lines.cells(index, ",")
        except UnusableSampleError as error:
            raise SourceError(f"{path}, row {index} {error.reason}") from error
        if len(cells) != 2 or not all(cell.strip() for cell in cells):
            found = reprlib.repr(cells)
            raise SourceError(f"{path}, row {index} is {found}, expected a LabelName and a DisplayName")
        label, name = cells
        number = names.setdefault(name, len(names))
        if numbers.setdefault(label.encode(), number) != number:
            raise SourceError(f"{path}, row {index}: {label} has another name in an earlier row")
    return list(names), numbers, lines.sha256
