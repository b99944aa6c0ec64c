"""The manifest of a cache: what it holds, what made it, and the hashes that show damage."""

import dataclasses
import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from opt_jax.cache.schema import Schema
from opt_jax.configuration import differences

MANIFEST = "manifest.json"
ROWS = "rows.npz"
STATISTICS = "statistics.npz"
QUARANTINE = "quarantine.jsonl"
FORMAT = 2
NAME = "opt"
"""Name of the dataset in file names, as TensorFlow Datasets wants one."""


class CacheError(Exception):
    """A cache is damaged, incomplete or missing."""


class FingerprintMismatch(CacheError):
    """A cache was made by something else than the configuration at hand."""

    def __init__(self, directory, found: Mapping, wanted: Mapping):
        lines = differences(found, wanted)
        super().__init__(
            f"the cache in {directory} was made by something else:\n"
            + "\n".join(f"  {line}" for line in lines)
            + "\nuse another directory, or delete this one to build it again"
        )


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file: its name, number of rows, bytes on disk, bytes of its records, and sha256 of the file."""

    file: str
    rows: int
    size: int
    payload: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Contents of manifest.json. `files` maps every file beside the shards to its sha256.

    num_source_rows = num_rows + num_quarantined. class_names are the multi-label classes, C of them; the
    detector's classes are counted by schema.region_classes.
    """

    split: str
    fingerprint: dict
    schema: Schema
    num_rows: int
    num_quarantined: int
    num_source_rows: int
    examples_per_shard: int
    class_names: tuple[str, ...]
    shards: tuple[Shard, ...]
    files: dict[str, str]

    @property
    def digest(self) -> str:
        """sha256 over everything else: two caches of equal content have equal digests."""
        return hashlib.sha256(json.dumps(self._content(), sort_keys=True).encode()).hexdigest()

    def _content(self) -> dict:
        return {"format": FORMAT, **dataclasses.asdict(self)}

    @property
    def text(self) -> str:
        """The content of manifest.json."""
        return json.dumps({**self._content(), "digest": self.digest}, indent=1) + "\n"

    def write(self, directory: Path) -> None:
        write_atomically(Path(directory) / MANIFEST, self.text.encode())


def read_manifest(directory: str | os.PathLike) -> Manifest:
    """Reads manifest.json. Raises CacheError when it is missing, of another format, or was edited."""
    path = Path(directory) / MANIFEST
    mend = f"delete {path.parent} and build the cache again"
    if not path.is_file():
        raise CacheError(
            f"{path} is missing: no cache there, or its build has not finished; run the build again"
        )
    try:
        text = path.read_bytes().decode()
        content = json.loads(text)
        digest, version = content.pop("digest"), content.pop("format")
        if version != FORMAT:
            raise CacheError(f"{path} has format {version}, expected {FORMAT}; {mend}")
        content["schema"] = Schema(**content["schema"])
        content["shards"] = tuple(Shard(**shard) for shard in content["shards"])
        content["class_names"] = tuple(content["class_names"])
        manifest = Manifest(**content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheError(f"{path} is damaged ({error!r}); {mend}") from error
    if manifest.digest != digest:
        raise CacheError(f"{path} was edited: digest {digest}, content {manifest.digest}; {mend}")
    if manifest.text != text:  # a key twice, or other spaces
        raise CacheError(f"{path} was edited: it is not as it was written; {mend}")
    return manifest


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def aside(path: Path) -> Path:
    """Where `path` is written before it is renamed; a new name, as a worker given up for lost may go on."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")


def write_atomically(path: Path, content: bytes) -> None:
    """The file is there with all of its content, or not at all."""
    beside = aside(path)
    with open(beside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes an .npz whose bytes depend on the arrays alone.

    Raises TypeError for an array of objects, which would be pickled.
    """
    for name, array in arrays.items():
        if array.dtype.hasobject:
            raise TypeError(f"{path}: {name} holds objects; store numbers or strings")
    beside = aside(path)
    with open(beside, "wb") as file:
        np.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)
