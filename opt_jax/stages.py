"""Stages: directories that say what made them, skipped when they are there and made by the same inputs."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from opt_jax.configuration import differences

DONE = "stage.json"
STARTED = "stage_inputs.json"


class StageMismatch(RuntimeError):
    """A stage's directory was made, or begun, by other inputs than those wanted now."""


def run_stage(
    name: str,
    directory: Path,
    inputs: Mapping[str, Any],
    build: Callable[[Path], Mapping[str, Any] | None],
    *,
    collective: bool = True,
    intact: Callable[[], bool] = lambda: True,
) -> dict[str, Any]:
    """Builds a stage once, and returns what it made.

    Args:
      name: for messages.
      directory: what the stage fills; made if absent. When `build` has returned, stage.json there records
        inputs, outputs and seconds of work.
      inputs: JSON-able, all that determines the content.
      build: fills the directory and returns its outputs (JSON-able, or None for none). A directory begun
        earlier by the same inputs is handed to it again, to go on with.
      collective: of a run of several processes all build (training does, on all devices); False: the first
        builds and the others wait. All must call it and share the file system; the first keeps the records.
      intact: asked of a directory that is done; False: `build` is to mend it.

    Raises:
      StageMismatch: the directory was made or begun by other inputs.
    """
    directory = Path(directory)
    wanted = json.loads(json.dumps(inputs, sort_keys=True))  # as it will be read back: tuples become lists
    done, started = read_record(directory / DONE), read_record(directory / STARTED)
    damaged = done is not None and done["inputs"] == wanted and not intact()
    _all_processes(f"{name}: records read")
    for record in (done, started):
        if record is not None and record["inputs"] != wanted:
            raise StageMismatch(_describe(name, directory, record["inputs"], wanted))
    if done is not None and not damaged:
        _say(f"{name}: up to date ({directory})")
        return done["outputs"]

    begins = "is damaged, and mended" if damaged else "starts" if started is None else "goes on"
    _say(f"{name}: {begins} ({directory})")
    before = 0.0 if started is None else started["seconds"]
    if jax.process_index() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / DONE).unlink(missing_ok=True)
        write_record(directory / STARTED, {"inputs": wanted, "seconds": before})
    _all_processes(f"{name}: begins")
    if not collective and jax.process_index() > 0:
        return _wait_for(directory / DONE)["outputs"]
    start = time.monotonic()
    try:
        outputs = dict(build(directory) or {})
    finally:
        seconds = before + time.monotonic() - start
        if jax.process_index() == 0:
            write_record(directory / STARTED, {"inputs": wanted, "seconds": seconds})
    if collective:
        _all_processes(f"{name}: built")
    if jax.process_index() == 0:
        write_record(directory / DONE, {"inputs": wanted, "outputs": outputs, "seconds": seconds})
        (directory / STARTED).unlink()
    if collective:
        _all_processes(f"{name}: recorded")
    _say(f"{name}: done in {seconds:.0f} s")
    return read_record(directory / DONE)["outputs"]  # the same in every process and every run


def read_record(path: Path) -> dict[str, Any] | None:
    """The record of a stage at `path`, None when there is none; StageMismatch when it cannot be read."""
    try:
        record = json.loads(path.read_text())
        missing = {"inputs", "seconds", *(["outputs"] if path.name == DONE else [])} - record.keys()
        if missing:
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError) as error:  # not JSON, not text, not an object
        raise StageMismatch(f"{path} is damaged ({error}); delete the directory {path.parent}") from error
    return record


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Writes JSON aside and renames it, so that a record is whole or not there."""
    aside = path.with_name(path.name + ".partial")
    aside.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    os.replace(aside, path)


@contextlib.contextmanager
def adding_seconds(path: Path):
    """Adds the time of the block to that noted in a file, so that an interrupted stage's parts add up."""
    start = time.monotonic()
    try:
        yield
    finally:
        if jax.process_index() == 0:
            write_record(path, {"seconds": noted_seconds(path) + time.monotonic() - start})


def noted_seconds(path: Path) -> float:
    """The time noted in a file by `adding_seconds`; 0 where there is none, or none that can be read: nothing
    but a figure depends on it."""
    try:
        return float(json.loads(path.read_text())["seconds"])
    except (OSError, ValueError, TypeError, KeyError):
        return 0.0


def _describe(name: str, directory: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    lines = [f"  {line}" for line in differences(found, wanted)]
    return "\n".join(
        [f"{name}: {directory} was made by other inputs (found -> wanted):"]
        + lines
        + [f"{name}: choose another --workdir, or delete {directory}"]
    )


def _wait_for(path: Path) -> dict[str, Any]:
    # A barrier of the devices would time out: what the first process builds can take hours.
    while (record := read_record(path)) is None:
        time.sleep(1)
    return record


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)


def _all_processes(place: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(place)
