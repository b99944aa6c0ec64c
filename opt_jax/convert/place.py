"""The folder that a conversion makes: whether it may be made there, and its making, whole or not at all."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from opt_jax.convert.opt_config import MODEL_TYPE
from opt_jax.convert.shards import ExportError
from opt_jax.export import MODELING_FILES, PROCESSING_FILES

WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
SETTINGS = ("config.json", "preprocessor_config.json", "tokenizer_config.json")
OWN = {"README.md", "special_tokens_map.json", "tokenizer.json", *MODELING_FILES, *PROCESSING_FILES}
ENCODERS = ("detector", "dvae", "wav2vec2")
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
    config = exported_config(out)
    if config is None:
        raise ExportError(f"{out} is no exported model, and only such a one --force replaces; name another")
    if "transformers_version" in config:  # which save_pretrained writes, and no export
        raise ExportError(
            f"{out} was written by save_pretrained, with weights that may be tuned; --force replaces only"
            " what an export wrote: name another, or delete it yourself"
        )
    if foreign := foreign_entries(out):
        more = f" and {len(foreign) - SHOWN} more" if len(foreign) > SHOWN else ""
        raise ExportError(
            f"{out} holds what no export writes ({', '.join(foreign[:SHOWN])}{more}); --force would delete"
            " it: move it away, or name another"
        )


def exported_config(folder: Path) -> dict | None:
    """config.json of an exported model, None where there is another or none."""
    try:
        config = json.loads((folder / "config.json").read_text())
        return config if config["model_type"] == MODEL_TYPE else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def foreign_entries(folder: Path) -> list[str]:
    """Entries of an exported folder that are not files or folders that an export writes, by their paths in
    it."""
    foreign = []
    for path in sorted(folder.iterdir()):
        if path.name in ENCODERS and path.is_dir() and not path.is_symlink():
            own = {*SETTINGS, "vocab.json"}
            foreign += [f"{path.name}/{file.name}" for file in sorted(path.iterdir()) if not _is(file, own)]
        elif not _is(path, OWN | set(SETTINGS)):
            foreign.append(path.name)
    return foreign


def _is(path: Path, names: set[str]) -> bool:
    known = path.name in names or WEIGHTS.fullmatch(path.name)
    return bool(known) and path.is_file() and not path.is_symlink()


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
