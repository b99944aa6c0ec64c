"""Builds a cache: cuts the source into shard tasks, runs those not yet done, and finishes."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from opt_jax.cache import engines
from opt_jax.cache.finish import INPUTS, finish, remove_leftovers
from opt_jax.cache.manifest import (
    MANIFEST,
    CacheError,
    FingerprintMismatch,
    Manifest,
    read_manifest,
    write_atomically,
)
from opt_jax.cache.schema import Schema
from opt_jax.cache.shard import RECORDS, ShardTask, load_record
from opt_jax.configuration import differences
from opt_jax.metrics_log import progress


def build_cache(
    source,
    extractor,
    directory,
    fingerprint: Mapping,
    *,
    split: str,
    schema: Schema,
    examples_per_shard: int = 256,
    processes: int = 1,
    beam: Sequence[str] | None = None,
) -> Manifest:
    """Extracts the features of every triplet of `source` into `directory`, or goes on where a build was
    killed.

    Args:
      source: random access to triplets (`opt_jax.data.triplet`).
      extractor: has `extract(triplets) -> list`, one result a triplet: a mapping of the arrays in
        `opt_jax.cache.schema.FIELDS` of its present modalities, or a `Quarantine`. Called once a shard. It
        has to be deterministic, and one row's result must not depend on the others. Other processes get
        pickled copies of it and of the source; `opt_jax.cache.extraction.Extraction` is small as a pickle.
      directory: one directory a split.
      fingerprint: JSON-able, says what determines the content (source, encoders, config).
      split: name of the split in file names.
      schema: sizes of the arrays.
      examples_per_shard: rows of the source a shard; the records of one are in memory, for each process.
      processes: on this machine. A program that asks for more than one needs the guard
        `if __name__ == "__main__":`, as these processes import it.
      beam: options of an Apache Beam pipeline, as ["--runner=DirectRunner"]; its workers run the tasks, and
        must see the directory, the source and the encoders at the same paths.

    Returns:
      The manifest. Of a finished cache only shards that are missing or of another size are made anew.

    Raises:
      FingerprintMismatch: the directory holds a cache, finished or not, that was made by something else.
      CacheError: what was made anew is not as it was; the directory cannot be made, or another process of
        this machine builds in it; the source is empty, no row of it was usable, a worker process died, or
        Apache Beam is missing.
    """
    directory = Path(directory).absolute()
    if not len(source):
        raise CacheError(f"the source of split {split!r} has no rows")
    inputs = {
        "fingerprint": json.loads(json.dumps(fingerprint)),
        "schema": vars(schema),
        "split": split,
        "num_source_rows": len(source),
        "examples_per_shard": examples_per_shard,
        "class_names": list(source.class_names),
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CacheError(f"{directory} cannot be made a folder: {error.strerror}") from error
    with _alone_in(directory):
        if (directory / MANIFEST).exists():
            manifest = read_manifest(directory)
            _demand_equal(directory, _inputs_of(manifest), inputs)
            _mend(directory, manifest, (source, extractor, schema), processes, beam)
            remove_leftovers(directory)
            return manifest
        started = directory / INPUTS
        if started.exists():
            _demand_equal(directory, json.loads(started.read_text()), inputs)
        elif any(path.suffix != ".partial" for path in directory.iterdir()):
            raise CacheError(f"{directory} is not empty and holds no cache; use another directory")
        else:
            write_atomically(started, json.dumps(inputs, indent=1).encode())
        tasks = _tasks(directory, split, len(source), examples_per_shard)
        _run(tasks, (source, extractor, schema), processes, beam)
        return finish(directory, tasks, inputs, schema)


@contextlib.contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """Refuses a second build in a directory on this machine; the lock goes with the process that holds it."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise CacheError(f"another process builds in {directory}; wait for it, or stop it") from error
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(handle)


def intact(directory: Path) -> bool:
    """Whether a finished cache is there, with every shard at its size. (`verify` re-reads them.)"""
    return (directory / MANIFEST).is_file() and not _damaged(directory, read_manifest(directory))


def _damaged(directory: Path, manifest: Manifest) -> list[int]:
    """Numbers of the shards that are missing, or not of their size."""
    paths = [directory / shard.file for shard in manifest.shards]
    sizes = [path.stat().st_size if path.is_file() else -1 for path in paths]
    return [n for n, shard in enumerate(manifest.shards) if sizes[n] != shard.size]


def _mend(directory: Path, manifest: Manifest, work: tuple, processes: int, beam) -> None:
    """Makes the damaged shards of a finished cache again, which have to become what they were: they are made
    aside, and take their places only then."""
    numbers = _damaged(directory, manifest)
    if not numbers:
        return
    rows, size = manifest.num_source_rows, manifest.examples_per_shard
    aside = directory / RECORDS
    aside.mkdir(exist_ok=True)  # where a build was killed, it holds what that had made
    every = _tasks(aside, manifest.split, rows, size)
    tasks = [every[number] for number in numbers]
    names = ", ".join(task.file for task in tasks)
    print(f"{directory}: missing or damaged, made again: {names}", flush=True)
    _run(tasks, work, processes, beam)
    for task in tasks:
        shard, expected = load_record(task)[0], manifest.shards[task.number]
        if shard.sha256 != expected.sha256:
            remove_leftovers(directory)
            raise CacheError(
                f"{directory / task.file} was made again and is not what it was: the data or the machine has"
                " changed; delete the cache and build it again"
            )
        os.replace(aside / task.file, directory / task.file)


def _inputs_of(manifest: Manifest) -> dict:
    return {
        "fingerprint": manifest.fingerprint,
        "schema": vars(manifest.schema),
        "split": manifest.split,
        "num_source_rows": manifest.num_source_rows,
        "examples_per_shard": manifest.examples_per_shard,
        "class_names": list(manifest.class_names),
    }


def _demand_equal(directory: Path, found: Mapping, wanted: Mapping) -> None:
    if differences(found, wanted):
        raise FingerprintMismatch(directory, found, wanted)


def _tasks(directory: Path, split: str, rows: int, size: int) -> list[ShardTask]:
    starts = range(0, rows, size)
    return [
        ShardTask(directory, split, number, len(starts), start, min(start + size, rows))
        for number, start in enumerate(starts)
    ]


def _run(tasks: Sequence[ShardTask], work: tuple, processes: int, beam: Sequence[str] | None) -> None:
    """Runs the unfinished tasks; `work` is (source, extractor, schema)."""
    pending = [task for task in tasks if not task.finished()]
    if not pending:
        return
    if beam is not None:
        finished = engines.on_beam(pending, *work, beam)
    elif processes > 1:
        finished = engines.in_processes(pending, *work, min(processes, len(pending)))
    else:
        finished = engines.in_this_process(pending, *work)
    total = tasks[-1].stop
    done = total - sum(task.stop - task.start for task in pending)
    # Closed at once when interrupted: the workers have to stop.
    with contextlib.closing(finished), progress(total, f"cache {tasks[0].split}", initial=done) as bar:
        for task in finished:
            bar.update(task.stop - task.start)
