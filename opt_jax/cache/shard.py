"""One shard is one idempotent task: write aside, close, re-read, hash, rename, record.

A shard is finished when its record (`records/00003.npz`) is there: the record is written last. Tasks share
nothing, so they may run in any order, on any machine that sees the directory.
"""

import dataclasses
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from opt_jax.cache import manifest as manifest_lib
from opt_jax.cache.ids import pack
from opt_jax.cache.manifest import CacheError, Shard
from opt_jax.cache.schema import Quarantine, Schema, caption_key, make_example, serialize
from opt_jax.data.triplet import SourceError, Triplet, UnusableSampleError

PIECE = 64 << 20  # bytes of pixels and sound that are read before they are extracted
RECORDS = "records"
WRITER_OPTIONS = "group_size:1,uncompressed"
"""Half-precision features hardly compress: 8 % smaller files would take three times as long to read."""
READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
"""Random access, without threads of its own."""

_MEASURED = {"region": "region_features", "audio": "audio_features"}


@dataclasses.dataclass(frozen=True)
class ShardTask:
    """Rows `start` to `stop` of the source become file number `number` of `count`."""

    directory: Path
    split: str
    number: int
    count: int
    start: int
    stop: int

    @property
    def file(self) -> str:
        return f"{manifest_lib.NAME}-{self.split}.array_record-{self.number:05d}-of-{self.count:05d}"

    @property
    def record(self) -> Path:
        return self.directory / RECORDS / f"{self.number:05d}.npz"

    def finished(self) -> bool:
        """Whether the record is there and its file has the recorded size."""
        if not self.record.exists():
            return False
        path = self.directory / self.file
        return path.exists() and path.stat().st_size == load_record(self)[0].size


def run_task(task: ShardTask, source, extractor, schema: Schema) -> None:
    """The whole task: reads, extracts, writes. What every worker of every engine does.

    `extractor.extract(triplets)` returns, for each triplet, a mapping of the arrays of its present
    modalities or a Quarantine. Raises ValueError when it breaks that contract, SourceError when the data is
    gone, CacheError when the written file does not read back.
    """
    records, parts, quarantined, pieces = [], [], [], read_pieces(source, task)
    with ThreadPoolExecutor(max_workers=1) as reading:  # the next piece, while this one is extracted
        upcoming = reading.submit(next, pieces, None)
        while (piece := upcoming.result()) is not None:
            upcoming = reading.submit(next, pieces, None)
            made, unusable = _extracted(piece[0], source, extractor, schema)
            # The arrays themselves go now; what stays of a shard are its records.
            new = [serialize(example, schema) for example in made]
            parts.append((_row_arrays(made, new), _sums(made, schema)))
            records += new
            quarantined += [*piece[1], *unusable]
    quarantined.sort(key=lambda line: line["row"])
    shard = _write(task, records)
    arrays = _joined([rows for rows, _ in parts], np.concatenate) | _joined([sums for _, sums in parts], sum)
    content = {"shard": dataclasses.asdict(shard), "quarantined": quarantined}
    task.record.parent.mkdir(exist_ok=True)
    manifest_lib.save_arrays(task.record, {"content": np.array(json.dumps(content)), **arrays})


def read_pieces(source, task: ShardTask) -> Iterator[tuple[list[tuple[int, Triplet]], list[dict]]]:
    """The task's rows in pieces that end at PIECE bytes of pixels and sound: (row, triplet) of those that can
    be read, and lines of quarantine.jsonl for the others.

    Raises SourceError and MemoryError: they are not about one row.
    """
    readable, quarantined, size = [], [], 0
    for row in range(task.start, task.stop):
        try:
            triplet = source[row]
            readable.append((row, triplet))
            ready = triplet.regions.features if triplet.regions is not None else None
            size += sum(x.nbytes for x in (triplet.image, triplet.audio, ready) if x is not None)
        except UnusableSampleError as error:
            quarantined.append(_quarantine_line(source, row, error.sample_id, "reading", str(error)))
        except (SourceError, MemoryError):
            raise
        except Exception as error:  # Whatever a decoder raises on a broken file concerns this row alone.
            reason = f"{type(error).__name__}: {error}"
            quarantined.append(_quarantine_line(source, row, None, "reading", reason))
        if size >= PIECE:
            yield readable, quarantined
            readable, quarantined, size = [], [], 0
    yield readable, quarantined


def _extracted(readable, source, extractor, schema: Schema) -> tuple[list[dict], list[dict]]:
    """Examples of the rows, and lines of quarantine.jsonl for those that nothing can be made of."""
    extracted = extractor.extract([triplet for _, triplet in readable]) if readable else []
    if len(extracted) != len(readable):
        raise ValueError(f"the extractor returned {len(extracted)} results for {len(readable)} triplets")
    examples, quarantined = [], []
    for (row, triplet), arrays in zip(readable, extracted, strict=True):
        made = arrays if isinstance(arrays, Quarantine) else make_example(triplet, arrays, row, schema)
        if isinstance(made, Quarantine):
            quarantined.append(_quarantine_line(source, row, triplet.id, "extraction", made.reason))
        else:
            examples.append(made)
    return examples, quarantined


def load_record(task: ShardTask) -> tuple[Shard, list[dict], dict[str, np.ndarray]]:
    """What `run_shard` recorded: the shard, its lines for quarantine.jsonl, arrays of rows and sums."""
    arrays = manifest_lib.load_arrays(task.record)
    content = json.loads(str(arrays.pop("content")))
    return Shard(**content["shard"]), content["quarantined"], arrays


def _quarantine_line(source, row: int, sample_id: str | None, stage: str, reason: str) -> dict:
    return {"row": row, "id": sample_id, "source": source.origin(row), "stage": stage, "reason": reason}


def _write(task: ShardTask, records: Sequence[bytes]) -> Shard:
    path = task.directory / task.file
    aside = manifest_lib.aside(path)
    writer = ArrayRecordWriter(os.fspath(aside), WRITER_OPTIONS)
    try:
        for record in records:
            writer.write(record)
        writer.close()
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # of the library, which says so of a full disk
        raise CacheError(
            f"{aside} cannot be written: {str(error)[:300]}\nIs the disk full? Finished shards are kept: once"
            " there is room, run the build again"
        ) from error
    reader = ArrayRecordReader(os.fspath(aside), READER_OPTIONS)
    back = reader.num_records() == len(records) and all(
        reader.read([number])[0] == record for number, record in enumerate(records)
    )
    if not back:
        raise CacheError(
            f"{aside} does not read back as it was written; check the disk and run the build again"
        )
    reader.close()
    shard = Shard(
        task.file, len(records), aside.stat().st_size, sum(map(len, records)), manifest_lib.sha256(aside)
    )
    os.replace(aside, path)
    return shard


def _row_arrays(examples: Sequence[dict], records: Sequence[bytes]) -> dict[str, np.ndarray]:
    """What the batch plan and `verify` need to know of every row, [rows] each; present is [rows, 3], the
    names as in `opt_jax.cache.ids`."""
    numbers = {
        "source_row": [example["index"] for example in examples],
        "text_length": [len(example["text_ids"]) for example in examples],
        "region_count": [len(example["region_features"]) for example in examples],
        "frame_count": [len(example["audio_features"]) for example in examples],
        "caption_key": [caption_key(example["caption"], example["id"]) for example in examples],
    }
    arrays = {name: np.array(values, np.int32) for name, values in numbers.items()}
    return arrays | pack([example["id"] for example in examples]) | {
        "present": np.array([example["present"] for example in examples], np.bool_).reshape(-1, 3),
        "checksum": np.array([zlib.crc32(record) for record in records], np.uint32),
    }


def _joined(parts: Sequence[dict[str, np.ndarray]], join) -> dict[str, np.ndarray]:
    return {name: np.asarray(join([part[name] for part in parts])) for name in parts[0]}


def _sums(examples: Sequence[dict], schema: Schema) -> dict[str, np.ndarray]:
    """Count, sum and sum of squares of the stored features, in float64."""
    arrays = {}
    sizes = {"region": schema.region_size, "audio": schema.audio_size}
    for name, field in _MEASURED.items():
        total, squares, count = np.zeros(sizes[name]), np.zeros(sizes[name]), 0
        for example in examples:
            values = example[field].astype(np.float64)
            total += values.sum(axis=0)
            squares += np.square(values).sum(axis=0)
            count += len(values)
        arrays |= {
            f"{name}_measured": np.array(count),
            f"{name}_sum": total,
            f"{name}_squares": squares,
        }
    return arrays
