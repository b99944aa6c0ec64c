"""Tar shards in WebDataset's naming: members that differ in their extension only are one sample.

    00017.jpg  00017.txt  00017.flac  00017.json

The name up to the first dot of its last part is the id. `.txt` is the caption; `.json` may hold `caption`,
`labels`, `references`, `speaker` and `group` (see `opt_jax.data.manifest`); pictures and recordings go by
their extension. Of other extensions and fields a warning tells. Shards must not be compressed: samples are
read at random.
"""

import collections
import dataclasses
import json
import os
import tarfile
import warnings
from array import array
from collections.abc import Iterator
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
KNOWN = ("caption", "labels", "references", "speaker", "group")  # fields of a .json
DAMAGED = -2  # in the place of a size
MAX_TEXT = 1 << 20  # bytes of a .txt or .json


class TarShards(RowSource):
    """All samples of some tar files, in their order. Members of a sample stand side by side.

    Opening reads the headers and texts of all members once; a name and 32 bytes of memory a member stay. A
    shard that is damaged or cut has one more sample, unusable, in the place of what is lost behind it.

    Args:
      paths: the shards. ids: 'members', the names of the members; 'shards', those with the shard's name
        before them, for shards that all begin with 000.
    """

    def __init__(self, paths, ids="members", class_names=None):
        if ids not in ("members", "shards"):
            raise SourceError(f"tar: ids={ids}; choose members or shards")
        self.paths, self._ids = [Path(path) for path in paths], ids
        if not self.paths:
            raise SourceError("no tar shards: the list of files is empty")
        self._ignored = collections.Counter()
        members, starts, last, self._names = array("q"), [], None, Texts()
        for number, path in enumerate(self.paths):
            for member in _members(path):
                if isinstance(member, Damage):
                    starts.append(len(self._names))
                    self._names.append(path.name.encode(errors="surrogateescape"))
                    members.extend((number, member.offset, DAMAGED))
                    continue
                folder, stem, extension = _split(member.name)
                if member.name.rpartition("/")[2].startswith(("._", ".DS_Store")):  # macOS adds them
                    continue
                if (extension := extension.lower()) not in TEXTS and extension not in PARTS:
                    self._ignored[extension or member.name] += 1
                if (number, folder, stem) != last:
                    starts.append(len(self._names))
                    last = number, folder, stem
                self._names.append(member.name.encode(errors="surrogateescape"))
                plain = member.isreg() and not member.issparse()
                members.extend((number, member.offset_data, member.size if plain else -1))
        self._members = np.array(members, np.int64).reshape(-1, 3)
        self._starts = np.array([*starts, len(self._names)], np.int64)
        sizes = [[path.name, path.stat().st_size] for path in self.paths]
        super().__init__("tar", self.paths[0].parent, {"shards": sizes}, class_names)
        if self._ignored:
            most = self._ignored.most_common(8)
            names = "".join(f"\n  {name}" + f", {count} members" * (count > 0) for name, count in most)
            warnings.warn(f"{self.paths[0]} and others: nothing is made of{names}", stacklevel=2)
            self._ignored.clear()

    def __len__(self) -> int:
        return len(self._starts) - 1

    def row(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {self.paths[0]} and others: there are {len(self)}")
        members = range(*self._starts[index : index + 2])
        names = [self._names[member].decode(errors="replace") for member in members]
        if self._members[members[0]][2] == DAMAGED:
            place = self._members[members[0]][1]
            reason = f"the shard is damaged or cut at byte {place}; what follows is lost"
            raise UnusableSampleError(names[0], "row", reason)
        sample_id, fields, texts = "".join(_split(names[0])[:2]) or names[0], {}, {}
        if self._ids == "shards":
            sample_id = f"{self.paths[self._members[members[0]][0]].stem}/{sample_id}"
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
            found = _fields(texts["json"], sample_id)
            for name in found.keys() - KNOWN if len(self._ignored) < 1000 else ():
                self._ignored.setdefault(f"{name!r} of .json", 0)  # not counted: rows are read more than once
            fields = {name: found[name] for name in KNOWN if name in found} | fields
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
    return fields


@dataclasses.dataclass(frozen=True)
class Damage:
    """Where a shard cannot be read on."""

    offset: int


def _members(path: Path) -> Iterator[tarfile.TarInfo | Damage]:
    """The members of a shard but folders, and last the place where it is damaged, if it is.

    Raises SourceError for a file that cannot be read, or whose beginning is no tar file.
    """
    end = 0
    try:
        with tarfile.open(path, "r:") as shard:
            while (member := _next(shard, end)) is not None:
                shard.members.clear()  # it would keep all of them
                end = shard.offset
                if isinstance(member, Damage):
                    yield member
                    return
                if not member.isdir():
                    yield member
        # tarfile takes a damaged header for the end. The true one is of zeros only, two blocks at least.
        with open(path, "rb") as file:
            file.seek(end)
            rest, size = file.read(2 * tarfile.BLOCKSIZE), os.path.getsize(path)
            if len(rest) < 2 * tarfile.BLOCKSIZE or any(rest):
                yield Damage(end)
            else:
                while rest := file.read(1 << 20):
                    if any(rest):
                        yield Damage(min(file.tell(), size) - len(rest))
                        return
    except (OSError, tarfile.TarError) as error:
        raise SourceError(f"{path} cannot be read as an uncompressed tar file: {error}") from error


def _next(shard: tarfile.TarFile, end: int) -> tarfile.TarInfo | Damage | None:
    """The next member; the first one has to be there."""
    try:
        return shard.next()
    except tarfile.TarError:
        if not end:
            raise
        return Damage(end)
