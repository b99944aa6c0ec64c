"""Builds a cache: cuts the source into shard tasks, runs those not yet done, and writes the manifest."""

import json
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from opt_jax.cache import manifest as manifest_lib
from opt_jax.cache.manifest import CacheError, FingerprintMismatch, Manifest, read_manifest
from opt_jax.cache.schema import Schema, features
from opt_jax.cache.shard import RECORDS, ShardTask, load_record, read_triplets, run_shard
from opt_jax.configuration import differences
from opt_jax.metrics_log import progress

INPUTS = "inputs.json"
_SUMS = [f"{name}_{part}" for name in ("region", "audio") for part in ("measured", "sum", "squares")]


def build_cache(
    source,
    extractor,
    directory,
    fingerprint: Mapping,
    *,
    split: str,
    schema: Schema,
    examples_per_shard: int = 256,
) -> Manifest:
    """Extracts the features of every triplet of `source` into `directory`, or goes on where a build was
    killed.

    Args:
      source: random access to triplets (`opt_jax.data.triplet`).
      extractor: has `extract(triplets) -> list`, one result a triplet: a mapping of the arrays in
        `opt_jax.cache.schema.FIELDS` of its present modalities, or a `Quarantine`. Called once a shard. It
        has to be deterministic, and one row's result must not depend on the others.
      directory: one directory a split.
      fingerprint: JSON-able, says what determines the content (source, encoders, config).
      split: name of the split in file names.
      schema: sizes of the arrays.
      examples_per_shard: rows of the source a shard; two shards of triplets are in memory at a time.

    Returns:
      The manifest. Where the finished cache is there already, nothing else happens.

    Raises:
      FingerprintMismatch: the directory holds a cache, finished or not, that was made by something else.
      CacheError: the source is empty, or no row of it was usable.
    """
    directory = Path(directory)
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
    directory.mkdir(parents=True, exist_ok=True)
    if (directory / manifest_lib.MANIFEST).exists():
        manifest = read_manifest(directory)
        _demand_equal(directory, _inputs_of(manifest), inputs)
        _remove_leftovers(directory)
        return manifest
    started = directory / INPUTS
    if started.exists():
        _demand_equal(directory, json.loads(started.read_text()), inputs)
    elif any(path.suffix != ".partial" for path in directory.iterdir()):
        raise CacheError(f"{directory} is not empty and holds no cache; use another directory")
    else:
        manifest_lib.write_atomically(started, json.dumps(inputs, indent=1).encode())
    tasks = _tasks(directory, split, len(source), examples_per_shard)
    _run(tasks, source, extractor, schema, split)
    return _finish(directory, tasks, inputs, schema)


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


def _run(tasks, source, extractor, schema: Schema, split: str) -> None:
    """Runs the unfinished tasks; the triplets of the next shard are read while this one is extracted."""
    pending = [task for task in tasks if not task.finished()]
    total = tasks[-1].stop
    done = total - sum(task.stop - task.start for task in pending)
    bar = progress(total, f"cache {split}", initial=done)
    with bar, ThreadPoolExecutor(max_workers=1) as reading:
        upcoming = reading.submit(read_triplets, source, pending[0]) if pending else None
        for number, task in enumerate(pending, start=1):
            rows = upcoming.result()
            upcoming = reading.submit(read_triplets, source, pending[number]) if pending[number:] else None
            run_shard(task, rows, extractor, schema)
            bar.update(len(rows))


def _finish(directory: Path, tasks, inputs: Mapping, schema: Schema) -> Manifest:
    """Joins the shards' records; the manifest comes last, so a cache with a manifest is whole."""
    shards, quarantined, arrays = zip(*map(load_record, tasks), strict=True)
    quarantined = [line for lines in quarantined for line in lines]
    num_rows = sum(shard.rows for shard in shards)
    if not num_rows:
        raise CacheError(f"all {len(quarantined)} rows were unusable; the first: {quarantined[0]['reason']}")
    row_arrays = {name: np.concatenate([a[name] for a in arrays]) for name in arrays[0] if name not in _SUMS}
    manifest_lib.save_arrays(directory / manifest_lib.ROWS, row_arrays)
    manifest_lib.save_arrays(directory / manifest_lib.STATISTICS, _statistics(arrays))
    lines = "".join(json.dumps(line) + "\n" for line in quarantined)
    manifest_lib.write_atomically(directory / manifest_lib.QUARANTINE, lines.encode())
    _write_tfds_metadata(directory, inputs["split"], shards, schema)
    beside = (
        manifest_lib.ROWS,
        manifest_lib.STATISTICS,
        manifest_lib.QUARANTINE,
        "features.json",
        "dataset_info.json",
    )
    manifest = Manifest(
        split=inputs["split"],
        fingerprint=inputs["fingerprint"],
        schema=schema,
        num_rows=num_rows,
        num_quarantined=len(quarantined),
        num_source_rows=inputs["num_source_rows"],
        examples_per_shard=inputs["examples_per_shard"],
        class_names=tuple(inputs["class_names"]),
        shards=tuple(shards),
        files={name: manifest_lib.sha256(directory / name) for name in beside},
    )
    if num_rows + len(quarantined) != manifest.num_source_rows:
        raise CacheError(
            f"{num_rows} rows written and {len(quarantined)} set aside of {manifest.num_source_rows}"
        )
    manifest.write(directory)
    _remove_leftovers(directory)
    return manifest


def _statistics(arrays) -> dict[str, np.ndarray]:
    """Mean and deviation, float32 [Dv] and [D], from the shards' sums added in the order of the shards.

    A dimension that does not vary gets deviation 1: dividing by next to nothing would blow up the first
    value that differs. Without any region (or frame) in the split, mean 0 and deviation 1.
    """
    statistics = {}
    for name in ("region", "audio"):
        count, total, squares = (
            sum(a[f"{name}_{part}"] for a in arrays) for part in ("measured", "sum", "squares")
        )
        mean = total / max(count, 1)
        deviation = np.sqrt(np.maximum(squares / max(count, 1) - np.square(mean), 0))
        deviation = np.where(deviation > 1e-4, deviation, 1)
        statistics |= {
            f"{name}_mean": mean.astype(np.float32),
            f"{name}_deviation": deviation.astype(np.float32),
        }
    return statistics


def _write_tfds_metadata(directory: Path, split: str, shards, schema: Schema) -> None:
    identity = tfds.core.DatasetIdentity(
        name=manifest_lib.NAME,
        version=tfds.core.Version("1.0.0"),
        data_dir=str(directory),
        module_name="opt_jax.cache",
    )
    info = tfds.core.DatasetInfo(
        builder=identity,
        features=features(schema),
        description="Features of frozen encoders over image-text-audio triplets.",
    )
    info.set_file_format("array_record")
    template = tfds.core.ShardedFileTemplate(
        dataset_name=manifest_lib.NAME, data_dir=directory, split=split, filetype_suffix="array_record"
    )
    split_info = tfds.core.SplitInfo(
        name=split,
        shard_lengths=[shard.rows for shard in shards],
        num_bytes=sum(shard.payload for shard in shards),
        filename_template=template,
    )
    info.set_splits(tfds.core.splits.SplitDict([split_info]))
    info.write_to_directory(directory)


def _remove_leftovers(directory: Path) -> None:
    shutil.rmtree(directory / RECORDS, ignore_errors=True)
    (directory / INPUTS).unlink(missing_ok=True)
    for path in directory.glob("*.partial"):
        path.unlink()
