"""Manifests: JSON lines or CSV that name pictures, sentences and recordings, one sample a row.

    {"id": "0001", "image": "0001.jpg", "caption": "A dog runs.", "audio": "0001.flac", "labels": ["dog"]}

Only `id` has to be there; paths are relative to the manifest. `references` (a list of captions beside the
first) and `speaker` may be given too, and `group`: rows of one group are never held out from one another. In
CSV the first row names the columns, an empty cell is nothing, and `labels` and `references` are separated by
'|'. In .tsv quotes mean nothing.
"""

import codecs
import warnings
from pathlib import Path

from opt_jax.configuration import nearest
from opt_jax.data.lines import Lines
from opt_jax.data.row import LISTS, Row, row_of
from opt_jax.data.rows import RowSource
from opt_jax.data.triplet import SourceError, UnusableSampleError

FIELDS = ("id", "image", "caption", "audio", "labels", "references", "speaker", "group")

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
MOST_IGNORED = 8  # names that a warning holds


class Manifest(RowSource):
    """A manifest of JSON lines (.jsonl, .ndjson, .json) or CSV (.csv; .tsv with tabs).

    Warns of fields that nothing here is made of, as `image_path`. Raises SourceError.
    """

    kind = "manifest"
    fields = FIELDS

    def __init__(self, path, class_names=None):
        path = Path(path)
        if path.suffix.lower() not in SUFFIXES:
            raise SourceError(f"{path} is no manifest; these end in {', '.join(SUFFIXES)}")
        self._delimiter = {".csv": ",", ".tsv": "\t"}.get(path.suffix.lower())
        table = self._delimiter is not None
        self.lines = Lines(path, quoted=self._delimiter == ",", skip=1 if table else 0)
        first = b"" if table or not len(self.lines) else self.lines.start(0, 64)
        if first.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            raise SourceError(
                f"{path} is a JSON array; write an object a line, as `jq -c '.[]' {path.name} > list.jsonl`"
                " does"
            )
        self._columns = [name.strip() for name in self.lines.names(self._delimiter)] if table else []
        if table and "id" not in self._columns:
            raise SourceError(f"{path}: its first row names no column `id`: {self._columns[:8]}")
        if twice := sorted({name for name in self._columns if name and self._columns.count(name) > 1}):
            raise SourceError(f"{path}: its first row names the column {twice[0]!r} more than once")
        self._ignored: set[str] = set()
        super().__init__(self.kind, path.parent, {"sha256": self.lines.sha256}, class_names)
        if self._ignored:
            names = [f"\n  {name!r}{nearest(name, self.fields)}" for name in sorted(self._ignored)]
            warnings.warn(f"{path}: fields that nothing is made of:{''.join(names)}", stacklevel=2)

    def __len__(self) -> int:
        return len(self.lines)

    def row(self, index: int) -> Row:
        if self._delimiter is None:
            values = self.lines.json(index)
        else:
            cells = self.lines.cells(index, self._delimiter)
            if len(cells) != len(self._columns):
                reason = f"has {len(cells)} cells, the header {len(self._columns)}"
                raise UnusableSampleError(self.lines.name_of(index), "row", reason)
            values = {name: cell for name, cell in zip(self._columns, cells, strict=True) if cell}
            values |= {name: list(filter(None, values[name].split("|"))) for name in LISTS if name in values}
        if len(self._ignored) < MOST_IGNORED:
            self._ignored.update(values.keys() - self.fields)
        values = {name: values[name] for name in self.fields if name in values}
        return row_of(values, self.lines.name_of(index))
