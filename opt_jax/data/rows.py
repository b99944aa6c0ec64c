"""What the sources of files have in common: rows that name files, checked and read as triplets."""

import abc
import hashlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opt_jax.data.decoding import check_caption
from opt_jax.data.files import decoded, found, read_file
from opt_jax.data.row import Row, check_id
from opt_jax.data.triplet import Regions, SourceError, Triplet, UnusableSampleError
from opt_jax.metrics_log import progress

PARTS = ("text", "image", "regions", "audio")
LOOKED_INTO = 32  # rows, spread over the list, whose files' content the fingerprint takes in
SHOWN = 100_000  # rows from which on looking through them shows its progress


class RowSource(abc.ABC):
    """A split whose samples are rows of a list and the files they name. Subclasses give `row` and `__len__`.

    Opening looks through all rows once: which ids occur twice, and the classes. Of the files it reads a few.
    The later of two rows with one id is unusable.

    Attributes:
      class_names; name, of the kind of source.
      modalities: of 'text', 'image', 'regions' and 'audio' those that some row has.
      groups: uint64 [N], equal for rows of one picture; 0 for an unusable row.

    Args:
      name: see above. folder: where the files are; a dict by 'image' and 'audio' where they lie apart, of
        those that rows name. identity: what tells this list from others, for the fingerprint, such as its
        hash. class_names: of the training split, where this is another; labels outside of it are left out.
    """

    file_parts: Sequence[str] = ("image", "audio")  # the parts of a row that name files
    image_subfolders: Sequence[str] = ()  # where a picture may be that is not in its folder itself

    def __init__(
        self, name: str, folder, identity: Mapping[str, Any], class_names: Sequence[str] | None = None
    ):
        folders = folder if isinstance(folder, Mapping) else {"image": folder, "audio": folder}
        self.name, self.identity = name, dict(identity)
        self.folders = {part: Path(path).resolve() for part, path in folders.items()}
        for path in self.folders.values():
            if not path.is_dir():
                raise SourceError(f"{path} is no folder; it should hold the files of the {name}")
        self.modalities: set[str] = set()
        self._named = np.zeros((len(self), len(PARTS)), np.bool_)
        self._duplicates, self.groups, labels = self._look_through()
        self.identity["files_sha256"] = self._files_sha256()
        self.class_names = sorted(labels) if class_names is None else list(class_names)
        if unknown := sorted(labels - set(self.class_names)):
            names = ", ".join(map(repr, unknown[:8])) + (", ..." if len(unknown) > 8 else "")
            told = f"{name}: labels that the training split has not are left out: {names}"
            warnings.warn(told, stacklevel=3)
        self._class_numbers = {name: number for number, name in enumerate(self.class_names)}

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def row(self, index: int) -> Row:
        """Row `index` of the list. Raises UnusableSampleError where it says nothing usable."""

    def regions(self, name: str, sample_id: str) -> Regions:
        """What a row's `features` names. Raises UnusableSampleError; always, where a kind has none."""
        raise UnusableSampleError(sample_id, "features", f"{name!r} are of no kind that {self.name} has")

    def content(self, name: str, sample_id: str, part: str) -> bytes:
        """Bytes of a file that a row names. Raises UnusableSampleError."""
        folder = self.folders[part]
        if part == "image":
            name = found(folder, name, self.image_subfolders)
        return read_file(folder, name, sample_id, part)

    def _look_through(self) -> tuple[np.ndarray, np.ndarray, set[str]]:
        """Rows whose id occurred before (int64, sorted), `groups`, and all labels."""
        ids, groups, labels = np.zeros(len(self), np.uint64), np.zeros(len(self), np.uint64), set()
        said = hashlib.sha256()
        rows: Iterable[int] = range(len(self))
        for index in progress(rows, f"{self.name}: rows") if len(self) >= SHOWN else rows:
            try:
                row = self.row(index)
                said.update(repr(row).encode())
                ids[index] = text_hash(row.id)
                groups[index] = text_hash(row.group or row.image or row.features or row.id)
                labels.update(row.labels)
                named = {"text": row.caption, "image": row.image, "regions": row.features, "audio": row.audio}
                self._named[index] = [named[part] is not None for part in PARTS]
            except UnusableSampleError as error:
                said.update(str(error).encode(errors="replace"))
        self.identity["rows_sha256"] = said.hexdigest()
        self.modalities.update(part for part, some in zip(PARTS, self._named.any(0), strict=True) if some)
        usable = np.flatnonzero(ids)
        order = usable[np.argsort(ids[usable], kind="stable")]
        same = ids[order][1:] == ids[order][:-1]
        return np.sort(order[1:][same]), groups, labels

    def _files_sha256(self) -> str:
        """Hash of some rows' files: another folder, or files made anew, are most likely noticed by it."""
        found = hashlib.sha256()
        for index in np.linspace(0, len(self) - 1, min(len(self), LOOKED_INTO)).astype(int):
            try:
                row = self.row(index)
                for part in self.file_parts:
                    name = getattr(row, part)
                    found.update(self.content(name, row.id, part) if name is not None else b"")
            except UnusableSampleError as error:
                found.update(error.part.encode())
        return found.hexdigest()

    def _checked(self, index: int) -> Row:
        row = self.row(index)
        check_id(row.id)
        place = np.searchsorted(self._duplicates, index)
        if place < len(self._duplicates) and self._duplicates[place] == index:
            raise UnusableSampleError(row.id, "id", "occurs in an earlier row; ids must differ")
        for caption in row.references:
            check_caption(caption, row.id)
        if not any(value is not None for value in (row.image, row.features, row.caption, row.audio)):
            raise UnusableSampleError(row.id, "row", "has neither image nor caption nor audio")
        return row

    def __getitem__(self, index: int) -> Triplet:
        return self.read(index)

    def read(self, index: int, image: bool = True, audio: bool = True) -> Triplet:
        """Sample `index`; picture, regions and sound are read only where asked for.

        Raises IndexError, and UnusableSampleError for a row or file that cannot be used.
        """
        row = self._checked(index)
        known = {name for name in row.labels if name in self._class_numbers}
        return Triplet(
            id=row.id,
            image=self._file(row, "image") if image and row.image is not None else None,
            caption=row.caption,
            audio=self._file(row, "audio") if audio and row.audio is not None else None,
            references=row.references,
            labels=tuple(sorted(self._class_numbers[name] for name in known)),
            speaker=row.speaker,
            regions=self.regions(row.features, row.id) if image and row.features is not None else None,
        )

    def _file(self, row: Row, part: str) -> np.ndarray:
        name = getattr(row, part)
        return decoded(self.content(name, row.id, part), name, row.id, part)

    def caption(self, index: int) -> str | None:
        """The caption of sample `index`, from the list; None for a row that cannot be used."""
        try:
            return self._checked(index).caption
        except UnusableSampleError:
            return None

    def rows_with(self, *parts: str) -> np.ndarray:
        """See `Source.rows_with`."""
        return np.flatnonzero(self._named[:, np.isin(PARTS, parts)].all(1))

    def origin(self, index: int) -> str:
        """All rows come from this source."""
        return self.name

    def fingerprint(self) -> dict[str, Any]:
        """Kind, count, classes, what the rows say, and the content of some files: of the others one that
        changes under the same name is not noticed."""
        classes = hashlib.sha256("\0".join(self.class_names).encode()).hexdigest()
        return {"source": self.name, "count": len(self), "classes_sha256": classes, **self.identity}


def text_hash(text: str) -> int:
    """Eight bytes, not 0: among a million rows two texts fall together by chance once in 40 million lists."""
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1
