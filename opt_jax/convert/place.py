"""The folder that a conversion makes: whether it may be made there, and its making, whole or not at all."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from opt_jax.convert.opt_config import MODEL_TYPE
from opt_jax.convert.shards import ExportError

CHECKSUMS = "checksums.sha256"  # of all other files of an exported folder, as `sha256sum -c` reads it
SHOWN = 5


def check_place(out: Path, force: bool) -> None:
    """Raises ExportError where `out` is there and may not be replaced: without `force` always, with it all
    but an exported folder in which nobody has put or written anything since."""
    if not out.exists() and not out.is_symlink():
        return
    if not force:
        raise ExportError(f"{out} exists; name a folder that is not there yet, or replace it with --force")
    if out.is_symlink() or not out.is_dir():
        raise ExportError(f"{out} is no exported model, and only such a one --force replaces; name another")
    if not any(out.iterdir()):
        return
    if exported_config(out) is None:
        raise ExportError(f"{out} is no exported model, and only such a one --force replaces; name another")
    if not (out / CHECKSUMS).is_file():
        raise ExportError(
            f"{out} has no {CHECKSUMS}, as save_pretrained writes none, and may hold tuned weights; --force"
            " replaces only what an export wrote: name another, or delete it yourself"
        )
    if foreign := foreign_entries(out):
        more = f" and {len(foreign) - SHOWN} more" if len(foreign) > SHOWN else ""
        raise ExportError(
            f"{out} holds what is not as an export wrote it ({', '.join(foreign[:SHOWN])}{more}); --force"
            " would delete it: move it away, or name another"
        )


def exported_config(folder: Path) -> dict | None:
    """config.json of an exported model, None where there is another or none."""
    try:
        config = json.loads((folder / "config.json").read_text())
        return config if config["model_type"] == MODEL_TYPE else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def write_checksums(folder: Path) -> None:
    """Lists the SHA-256 of every file that is in the folder now."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{sha256(file)}  {file.relative_to(folder).as_posix()}\n" for file in files]
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")


def foreign_entries(folder: Path) -> list[str]:
    """Entries of an exported folder, by their paths in it, that were added or changed since it was written:
    what the list of checksums does not have, or not like that."""
    lines = (folder / CHECKSUMS).read_text(encoding="utf-8", errors="replace").splitlines()
    written = dict(line.split("  ", 1)[::-1] for line in lines if "  " in line)
    own = {parent.as_posix() for name in written for parent in Path(name).parents}
    foreign = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_symlink() and (name == CHECKSUMS or path.is_dir() and name in own):
            continue
        whole = name in written and path.is_file() and not path.is_symlink()
        if not whole or sha256(path) != written[name]:
            foreign.append(name)
    return foreign


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def beside(out: Path) -> Iterator[Path]:
    """A fresh folder beside `out`, which becomes `out` at the end, in place of what was there.

    Where the body raises, nothing is left of the folder, and what was in `out` stays. Raises OSError.
    """
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    aside, old = (out.with_name(f".{out.name}.{os.getpid()}{end}") for end in ("", ".old"))
    aside.mkdir()
    try:
        yield aside
        if out.exists():
            out.rename(old)
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if old.exists() and not out.exists():
            old.rename(out)
        shutil.rmtree(old, ignore_errors=True)


def straight(out: Path) -> Path:
    """The path without '..' and links on the way, but itself a link where it is one."""
    return out if out.is_symlink() else out.resolve()


def reason(error: OSError, out: Path) -> str:
    """One line about a failure to read or write; one that names no file is about writing `out`."""
    return str(error) if error.filename else f"{out} cannot be written: {error.strerror or error}"
