"""Pictures as the features of a detector elsewhere: npz files as UNITER's, tables as of bottom-up attention.

The sentences come from a manifest (`captions`, see `opt_jax.data.manifest`), which may name pictures and
recordings too. Its field `features` says which file or row of the table belongs to a sample; without it that
is the one called as the sample is.
"""

import base64
import dataclasses
import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from opt_jax.data.files import read_file
from opt_jax.data.lines import Lines
from opt_jax.data.manifest import FIELDS, Manifest
from opt_jax.data.regions import MAX_REGIONS, MAX_WIDTH, regions_of
from opt_jax.data.row import Row
from opt_jax.data.rows import text_hash
from opt_jax.data.triplet import Regions, SourceError, UnusableSampleError

MAX_BYTES = MAX_REGIONS * MAX_WIDTH * 8  # of one array
ARRAYS = {  # names in npz files: detectron2's; UNITER's; those of MILVLG's bottom-up-attention.pytorch
    "features": ("feat", "features", "x"),
    "boxes": ("pred_boxes", "bbox", "boxes"),
    "relative_boxes": ("norm_bb",),
    "scores": ("scores", "conf"),
    "classes": ("pred_classes",),
    "soft_labels": ("soft_labels",),
    "width": ("width", "image_w"),
    "height": ("height", "image_h"),
}
COLUMNS = {  # of tables, by their number: bottom-up attention (tools/generate_tsv.py); LXMERT
    6: ("id", "width", "height", "count", "boxes", "features"),
    10: ("id", "height", "width", "classes", "scores", "", "", "count", "boxes", "features"),
}


class _Captioned(Manifest):
    fields = (*FIELDS, "features")

    def row(self, index: int) -> Row:
        row = super().row(index)
        return row if row.features is not None else dataclasses.replace(row, features=row.id)


class RegionFiles(_Captioned):
    """npz files, one a picture, called as `features` says, with or without .npz.

    Their arrays, for R regions, under the names in ARRAYS: feat [R, Dv]; pred_boxes [R, 4], x1 y1 x2 y2 in
    pixels, with width and height of the picture, or UNITER's norm_bb [R, 6], relative to the picture; scores
    [R]; pred_classes [R], from 0, or UNITER's soft_labels [R, 1601], of which 0 is the background. Others are
    not looked at.

    Args:
      path: the folder. captions: the manifest.
    """

    kind = "region_npz"
    file_parts = (*Manifest.file_parts, "features")

    def __init__(self, path, captions, class_names=None):
        self.folder = Path(path).resolve()
        if not self.folder.is_dir():
            raise SourceError(f"{path} is no folder; it should hold npz files")
        super().__init__(captions, class_names)

    def content(self, name: str, sample_id: str, part: str) -> bytes:
        if part != "features":
            return super().content(name, sample_id, part)
        return read_file(self.folder, name if name.endswith(".npz") else f"{name}.npz", sample_id, part)

    def regions(self, name: str, sample_id: str) -> Regions:
        content = self.content(name, sample_id, "features")
        try:
            arrays = _read_npz(content)
        except Exception as error:  # zipfile and numpy raise all kinds on damaged files
            reason = f"{name!r} cannot be read: {str(error) or type(error).__name__}"
            raise UnusableSampleError(sample_id, "features", reason) from error
        return regions_of(arrays, sample_id)


class RegionTable(_Captioned):
    """A table with a row for each picture, called as the first cell says.

    image_id, image_w, image_h, num_boxes, boxes and features (base64 of float32, boxes in pixels), as
    bottom-up attention writes it, or LXMERT's ten columns, which have classes and scores.

    Args:
      path: the table. captions: the manifest.
    """

    kind = "region_tsv"

    def __init__(self, path, captions, class_names=None):
        self.table = Lines(path)
        names = (self.table.start(index, 1000).partition(b"\t")[0] for index in range(len(self.table)))
        hashes = [text_hash(name.decode(errors="replace")) for name in names]
        self._order = np.argsort(np.array(hashes, np.uint64), kind="stable")
        self._hashes = np.array(hashes, np.uint64)[self._order]
        super().__init__(captions, class_names)
        self.identity["table_sha256"] = self.table.sha256

    def regions(self, name: str, sample_id: str) -> Regions:
        place = np.searchsorted(self._hashes, np.uint64(text_hash(name)))
        try:
            cells = self.table.cells(int(self._order[place]), "\t") if place < len(self._order) else [""]
            if cells[0] != name:
                raise ValueError(f"there is none in {self.table.path.name}")
            arrays = _read_cells(cells)
        except ValueError as error:
            raise UnusableSampleError(sample_id, "features", f"of row {name!r}: {error}") from error
        return regions_of(arrays, sample_id)


def _read_npz(content: bytes) -> dict[str, np.ndarray]:
    """The arrays of ARRAYS that are there. Nothing is unpickled. Raises all kinds of errors."""
    arrays = {}
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        present = set(archive.namelist())
        for key, names in ARRAYS.items():
            member = next((f"{name}.npy" for name in names if f"{name}.npy" in present), None)
            if member is None:
                continue
            if archive.getinfo(member).file_size > MAX_BYTES:
                raise ValueError(f"{member} has over {MAX_BYTES >> 20} MiB")
            with archive.open(member) as file:
                arrays[key] = np.lib.format.read_array(file, allow_pickle=False)
    return arrays


def _read_cells(cells: list[str]) -> Mapping[str, np.ndarray]:
    """The arrays of a table's row. Raises ValueError."""
    if len(cells) not in COLUMNS:
        raise ValueError(f"it has {len(cells)} cells, expected 6, or LXMERT's 10")
    named = dict(zip(COLUMNS[len(cells)], cells, strict=True))
    count, width, height = (int(named[name]) for name in ("count", "width", "height"))
    if not 1 <= count <= MAX_REGIONS:
        raise ValueError(f"it has {count} regions, not 1 to {MAX_REGIONS}")
    arrays = {"width": np.array(width), "height": np.array(height)}
    for name in [name for name in ("boxes", "features", "scores", "classes") if name in named]:
        text = named[name]
        text = text[2:-1] if text.startswith("b'") else text  # bytes that Python 3 wrote as they print
        dtype = "<i8" if name == "classes" else "<f4"
        array = np.frombuffer(base64.b64decode(text, validate=True), dtype)
        if len(array) % count:
            raise ValueError(f"its {name} are {len(array)} numbers for {count} regions")
        arrays[name] = array.reshape(count, -1) if name in ("boxes", "features") else array
    return arrays
