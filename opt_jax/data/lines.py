"""Random access to the rows of text files of any size: eight bytes of memory a row.

A row of JSON lines is a line; one of CSV goes on over line breaks within quotes.
"""

import contextlib
import csv
import hashlib
import io
import json
import os
from array import array
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from opt_jax.data.triplet import SourceError, UnusableSampleError

MAX_ROW = 16 << 20  # bytes; UNITER's and bottom-up attention's rows hold features


class Texts:
    """Many short texts as one piece of memory: eight bytes beside each."""

    def __init__(self, texts: Iterable[bytes] = ()):
        self._bytes, self._ends = bytearray(), array("q", [0])
        for text in texts:
            self.append(text)

    def append(self, text: bytes) -> None:
        self._bytes += text
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> bytes:
        return bytes(self._bytes[self._ends[index] : self._ends[index + 1]])


class Lines:
    """Rows of a text file, as bytes; can be pickled and shared by worker processes. Empty lines are none.

    Args:
      path: the file. quoted: line breaks within double quotes belong to their row (CSV, RFC 4180). skip: rows
        before the first, such as a header.

    Attributes: sha256 of the whole file; header, the skipped rows, as bytes.

    Raises SourceError when the file cannot be read, or ends within quotes.
    """

    def __init__(self, path, *, quoted: bool = False, skip: int = 0):
        self.path = Path(path)
        digest, starts, position, inside, whole = hashlib.sha256(), array("q"), 0, False, True
        try:
            with open(self.path, "rb") as file:
                while line := file.readline(MAX_ROW):  # a longer line comes in pieces
                    digest.update(line)
                    if whole and not inside and line.strip():
                        starts.append(position)
                    position += len(line)
                    whole = line.endswith(b"\n")
                    if quoted and b'"' in line:
                        inside = _ends_inside(line, inside)
        except OSError as error:
            raise SourceError(f"{self.path} cannot be read: {error.strerror}") from error
        if inside:
            row = len(starts) - 1 - skip
            raise SourceError(
                f"{self.path}, row {row}: a quote is never closed; write a quote in a cell twice"
            )
        ends = np.append(np.frombuffer(starts, np.int64), position)
        self._starts, self.sha256 = ends[skip:].copy(), digest.hexdigest()
        self._file = None
        self.header = [self._span(*ends[i : i + 2]) for i in range(min(skip, len(ends) - 1))]

    def __len__(self) -> int:
        return max(len(self._starts) - 1, 0)

    def __getitem__(self, index: int) -> bytes:
        """Row `index`. Raises IndexError; UnusableSampleError for one over MAX_ROW bytes."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {self.path}: there are {len(self)}")
        start, stop = self._starts[index : index + 2]
        if stop - start > MAX_ROW:
            reason = f"has {(stop - start) >> 20} MiB, at most {MAX_ROW >> 20}"
            raise UnusableSampleError(self.name_of(index), "row", reason)
        return self._span(start, stop)

    def start(self, index: int, size: int) -> bytes:
        """The first bytes of row `index`, at most `size`."""
        start, stop = self._starts[index : index + 2]
        return self._span(start, min(stop, start + size))

    def _span(self, start, stop) -> bytes:
        if self._file is None:
            self._file = open(self.path, "rb")
        # Threads and forked processes share the position in the file: nothing here may depend on it.
        return os.pread(self._file.fileno(), int(stop - start), int(start))

    def name_of(self, index: int) -> str:
        """What a row is called that has no readable id."""
        return f"{self.path.name}, row {index}"

    def text(self, index: int, fields_of: Callable[[str], Mapping] = lambda text: {}) -> str:
        """Row `index` as text. Raises UnusableSampleError where it is no UTF-8, with the id that `fields_of`
        finds in the rest of the row."""
        content, encoding = self[index], "utf-8-sig" if not index else "utf-8"
        try:
            return content.decode(encoding).rstrip("\r\n")
        except UnicodeDecodeError as error:
            sample_id = self.name_of(index)
            # The row is broken: whatever it says in the place of its id, or raises, is no matter.
            with contextlib.suppress(Exception):
                found = fields_of(content.decode(encoding, errors="replace").rstrip("\r\n"))["id"]
                if isinstance(found, str) and "\ufffd" not in found:
                    sample_id = found or sample_id
            raise UnusableSampleError(sample_id, "row", f"is no valid UTF-8: {error}") from error

    def json(self, index: int) -> dict:
        """Row `index` as the JSON object it holds. Raises UnusableSampleError where it holds none."""
        try:
            value = json.loads(self.text(index, json.loads))
        except (ValueError, RecursionError) as error:
            if isinstance(error, UnusableSampleError):
                raise
            raise UnusableSampleError(self.name_of(index), "row", f"is no valid JSON: {error}") from error
        if not isinstance(value, dict):
            reason = f'holds {type(value).__name__}, expected an object such as {{"id": ...}}'
            raise UnusableSampleError(self.name_of(index), "row", reason)
        return value

    def cells(self, index: int, delimiter: str) -> list[str]:
        """Cells of row `index`, of CSV (delimiter ',') or tab-separated text, where quotes mean nothing.

        Raises UnusableSampleError.
        """

        def fields_of(text: str) -> dict[str, str]:
            names = [name.strip() for name in self.names(delimiter)]
            return dict(zip(names, cells_of(text, delimiter), strict=True))

        try:
            return cells_of(self.text(index, fields_of), delimiter)
        except csv.Error as error:
            raise UnusableSampleError(self.name_of(index), "row", f"is no valid CSV: {error}") from error

    def names(self, delimiter: str) -> list[str]:
        """The cells of the header. Raises SourceError."""
        try:
            return cells_of(b"".join(self.header).decode("utf-8-sig").rstrip("\r\n"), delimiter)
        except (csv.Error, UnicodeDecodeError) as error:
            raise SourceError(f"{self.path}: its first row cannot be read: {error}") from error

    def __getstate__(self):
        return {**self.__dict__, "_file": None}


def cells_of(text: str, delimiter: str) -> list[str]:
    """Cells of one row, see `Lines.cells`. Raises csv.Error."""
    if delimiter == "\t" or '"' not in text:
        return text.partition("\n")[0].rstrip("\r").split(delimiter)
    return next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), [])


def _ends_inside(line: bytes, inside: bool) -> bool:
    """Whether a line of CSV ends within quotes. A quote opens a cell only where the cell begins."""
    parts = line.replace(b'""', b"").split(b'"')
    for number, part in enumerate(parts[:-1]):
        inside = not inside and (part.endswith(b",") or (number == 0 and not part))
    return inside
