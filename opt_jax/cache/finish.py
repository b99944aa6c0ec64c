"""The end of a build: joins what the shard tasks recorded, and writes the manifest last."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from opt_jax.cache import manifest as manifest_lib
from opt_jax.cache.manifest import CacheError, Manifest
from opt_jax.cache.schema import Schema, features
from opt_jax.cache.shard import RECORDS, ShardTask, load_record

INPUTS = "inputs.json"
"""What a build that has begun is made of; gone when it has finished."""
_SUMS = [f"{name}_{part}" for name in ("region", "audio") for part in ("measured", "sum", "squares")]


def finish(directory: Path, tasks: Sequence[ShardTask], inputs: Mapping, schema: Schema) -> Manifest:
    """Writes what lies beside the shards; a cache with a manifest is whole.

    Raises CacheError when no row was usable.
    """
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
    remove_leftovers(directory)
    return manifest


def remove_leftovers(directory: Path) -> None:
    """Deletes what only an unfinished build needs, and what kills in the middle of a write left behind."""
    shutil.rmtree(directory / RECORDS, ignore_errors=True)
    (directory / INPUTS).unlink(missing_ok=True)
    for path in directory.glob("*.partial"):
        path.unlink()


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
