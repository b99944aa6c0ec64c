"""Tar shards in WebDataset's naming: members that differ in their extension only are one sample.

    00017.jpg  00017.txt  00017.flac  00017.json

The name up to the first dot of its last part is the id. `.txt` is the caption; `.json` may hold `caption`,
`labels`, `references`, `speaker` and `group` (see `opt_jax.data.manifest`); pictures and recordings go by
their extension, others are ignored. Shards must not be compressed: samples are read at random.
"""

import json
import tarfile
from array import array
from pathlib import Path

import numpy as np

from opt_jax.data.decoding import FORMATS
from opt_jax.data.files import MAX_BYTES, check_name
from opt_jax.data.lines import Texts
from opt_jax.data.row import Row, row_of
from opt_jax.data.rows import RowSource
from opt_jax.data.triplet import SourceError, UnusableSampleError

SOUND = (".flac", ".wav", ".ogg", ".mp3", ".opus")
PARTS = dict.fromkeys(FORMATS, "image") | dict.fromkeys(SOUND, "audio")
TEXTS = {".txt": "caption", ".json": "json"}
MAX_TEXT = 1 << 20  # bytes of a .txt or .json


class TarShards(RowSource):
    """All samples of some tar files, in their order. Members of a sample stand side by side.

    Opening reads the headers and texts of all members once; a name and 32 bytes of memory a member stay.
    """

    def __init__(self, paths, class_names=None):
        self.paths = [Path(path) for path in paths]
        if not self.paths:
            raise SourceError("no tar shards: the list of files is empty")
        members, starts, last, self._names = array("q"), [], None, Texts()
        for number, path in enumerate(self.paths):
            for member in _members(path):
                stem = (number, *_split(member.name)[:2])
                if stem != last:
                    starts.append(len(self._names))
                    last = stem
                self._names.append(member.name.encode(errors="surrogateescape"))
                plain = member.isreg() and not member.issparse()
                members.extend((number, member.offset_data, member.size if plain else -1))
        self._members = np.array(members, np.int64).reshape(-1, 3)
        self._starts = np.array([*starts, len(self._names)], np.int64)
        sizes = [[path.name, path.stat().st_size] for path in self.paths]
        super().__init__("tar", self.paths[0].parent, {"shards": sizes}, class_names)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def row(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {self.paths[0]} and others: there are {len(self)}")
        members = range(*self._starts[index : index + 2])
        names = [self._names[member].decode(errors="replace") for member in members]
        sample_id, fields, texts = "".join(_split(names[0])[:2]) or names[0], {}, {}
        for member, name in zip(members, names, strict=True):
            check_name(name, sample_id, "row")
            if self._members[member][2] < 0:
                raise UnusableSampleError(sample_id, "row", f"{name!r} is a link or device, no file")
            extension = _split(name)[2].lower()
            if extension in TEXTS:
                texts.setdefault(TEXTS[extension], self._text(member, sample_id, name))
            elif extension in PARTS:
                fields.setdefault(PARTS[extension], f"{member}{extension}")
        if "json" in texts:
            fields = _fields(texts["json"], sample_id) | fields
        if "caption" in texts:
            fields["caption"] = texts["caption"]
        return row_of(fields | {"id": sample_id}, sample_id)

    def _text(self, member: int, sample_id: str, name: str) -> str:
        if self._members[member][2] > MAX_TEXT:
            raise UnusableSampleError(sample_id, "caption", f"{name!r} has over {MAX_TEXT >> 20} MiB")
        try:
            return self._bytes(member, sample_id, name).decode().strip()
        except UnicodeDecodeError as error:
            raise UnusableSampleError(sample_id, "caption", f"{name!r} is no valid UTF-8: {error}") from error

    def _bytes(self, member: int, sample_id: str, name: str) -> bytes:
        number, offset, size = map(int, self._members[member])
        try:
            with open(self.paths[number], "rb") as file:
                file.seek(offset)
                content = file.read(size)
        except OSError as error:
            raise SourceError(f"{self.paths[number]} cannot be read: {error.strerror}") from error
        if len(content) < size:
            reason = f"{name!r}: {self.paths[number]} ends after {len(content)} of its {size} bytes"
            raise UnusableSampleError(sample_id, "row", reason)
        return content

    def content(self, name: str, sample_id: str, part: str) -> bytes:
        member = int(name.partition(".")[0])  # the number that `row` gave
        if self._members[member][2] > MAX_BYTES:
            raise UnusableSampleError(sample_id, part, f"has over {MAX_BYTES >> 20} MiB")
        return self._bytes(member, sample_id, name)


def _split(name: str) -> tuple[str, str, str]:
    """'a/b/c.jpg' -> 'a/b/', 'c', '.jpg'."""
    folder, slash, last = name.rpartition("/")
    stem, dot, extension = last.partition(".")
    return folder + slash, stem, dot + extension


def _fields(text: str, sample_id: str) -> dict:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnusableSampleError(sample_id, "row", f"has a .json that is no valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise UnusableSampleError(
            sample_id, "row", f"has a .json that holds {type(fields).__name__}, no object"
        )
    known = ("caption", "labels", "references", "speaker", "group")
    return {key: fields[key] for key in known if key in fields}


def _members(path: Path):
    try:
        with tarfile.open(path, "r:") as shard:
            while (member := shard.next()) is not None:
                shard.members.clear()  # it would keep all of them
                if not member.isdir():
                    yield member
    except (OSError, tarfile.TarError) as error:
        raise SourceError(f"{path} cannot be read as an uncompressed tar file: {error}") from error
