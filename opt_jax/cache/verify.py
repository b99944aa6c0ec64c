"""Re-reads a whole cache: `python -m opt_jax.cache.verify DIRECTORY` lists what is damaged, and says how to
mend it.

Exit status 1 if anything is.
"""

import argparse
import os
import sys
import zlib
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordReader

from opt_jax.cache import manifest as manifest_lib
from opt_jax.cache.ids import Ids
from opt_jax.cache.manifest import CacheError, read_manifest
from opt_jax.cache.schema import deserialize
from opt_jax.cache.shard import READER_OPTIONS
from opt_jax.metrics_log import progress


def verify(directory) -> list[str]:
    """One line for each thing that is wrong, naming the file, the record and its id; [] if nothing is.

    Where rows.npz, which has the ids, is damaged itself, records are named by their numbers alone.
    """
    directory = Path(directory)
    try:
        manifest = read_manifest(directory)
    except CacheError as error:
        return [str(error)]
    problems = []
    for name, digest in manifest.files.items():
        path = directory / name
        if not path.is_file():
            problems.append(f"{name}: missing")
        elif manifest_lib.sha256(path) != digest:
            problems.append(f"{name}: sha256 is not the manifest's")
    expected = {manifest_lib.MANIFEST, *manifest.files, *(shard.file for shard in manifest.shards)}
    problems += [
        f"{path.name}: does not belong here"
        for path in sorted(directory.iterdir())
        if path.name not in expected
    ]
    rows = ids = None
    if not any(problem.startswith(manifest_lib.ROWS) for problem in problems):
        rows = manifest_lib.load_arrays(directory / manifest_lib.ROWS)
        ids = Ids(rows)
    start = 0
    for shard in progress(manifest.shards, "verify"):
        span = range(start, start + shard.rows)
        names = rows and {"id": [ids[row] for row in span], "checksum": rows["checksum"][start : span.stop]}
        problems += _verify_shard(directory / shard.file, shard, names, manifest.schema)
        start += shard.rows
    return problems


def _verify_shard(path: Path, shard, rows, schema) -> list[str]:
    ids = f" (ids {rows['id'][0]} to {rows['id'][-1]})" if rows and shard.rows else ""
    records = f"records 0 to {shard.rows - 1}{ids}" if shard.rows else "no record"
    if not path.is_file():
        return [f"{shard.file}: missing, with {records}"]
    size = path.stat().st_size
    if size == shard.size and manifest_lib.sha256(path) == shard.sha256:
        whole = []
    else:
        whole = [f"{shard.file}: {size} bytes of {shard.size}, sha256 is not the manifest's; held {records}"]
    try:
        reader = ArrayRecordReader(os.fspath(path), READER_OPTIONS)
        count = reader.num_records()
    except Exception as error:
        return [*whole, f"{shard.file}: cannot be opened ({error}); lost with it: {records}"]
    if count != shard.rows:
        return [*whole, f"{shard.file}: {count} records, expected {records}"]
    damaged = []
    for position in range(count):
        name = f"record {position}" + (f" (id {rows['id'][position]})" if rows else "")
        try:
            record = reader.read([position])[0]
            if rows and zlib.crc32(record) != rows["checksum"][position]:
                raise ValueError("checksum differs")
            deserialize(record, schema)
        except Exception as error:
            damaged.append(f"{shard.file}: {name} is damaged ({error})")
    if whole and not damaged:
        whole.append(f"{shard.file}: the damage is between records; {records} read as they were written")
    return whole + damaged


def remedy(directory, problems: list[str]) -> list[str]:
    """What to do about the problems that `verify` found: shards can be made again alone, the rest cannot."""
    try:
        manifest = read_manifest(directory)
    except CacheError:
        return []  # it says so itself
    damaged = {problem.partition(":")[0] for problem in problems}
    shards = [shard.file for shard in manifest.shards if shard.file in damaged]
    if damaged & manifest.files.keys():
        return [f"to mend it: delete {directory} and build the cache again"]
    if shards:
        names = ", ".join(shards)
        return [f"to mend it: delete {names} and run the build again, which makes only missing shards anew"]
    return []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", help="directory of one split")
    directory = parser.parse_args().directory
    problems = verify(directory)
    print("\n".join([*problems, *remedy(directory, problems)]) or "no damage found")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
