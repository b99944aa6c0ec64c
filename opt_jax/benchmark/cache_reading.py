"""What reading the feature cache costs beyond its files: `python -m opt_jax.benchmark.cache_reading`.

Writes a cache with features of the paper's sizes, and reads all rows in a random order: by `FeatureCache`,
and the same records of the same files by ArrayRecord alone, in turn. Then the loader's padded batches. The
files lie in the system's memory after the first reading, so a disk takes no part in the figures.
"""

import argparse
import os
import tempfile

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from opt_jax.benchmark.measure import interleaved, middle
from opt_jax.cache import FeatureCache, Schema, build_cache
from opt_jax.cache.shard import READER_OPTIONS
from opt_jax.data.loader import Loader, LoaderConfig
from opt_jax.data.triplet import Triplet

RAW, CACHE, LOADER = "ArrayRecord alone", "FeatureCache", "Loader"
TEXT, STACK = 30, 4


class Words:
    """A source of triplets whose parts nobody looks at."""

    class_names = ("ball",)

    def __init__(self, rows: int):
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> Triplet:
        image, audio = np.zeros((8, 8, 3), np.uint8), np.zeros(400, np.float32)
        return Triplet(f"row-{row}", image=image, caption=f"ball {row}", audio=audio, labels=(0,))


class Noise:
    """Features drawn at random: R regions [R, Dv], F frames [F, D], K codes."""

    def __init__(self, schema: Schema, regions: int, frames: int):
        self.schema, self.regions, self.frames = schema, regions, frames

    def extract(self, triplets) -> list[dict]:
        return [self._one(np.random.default_rng(int(triplet.id[4:]))) for triplet in triplets]

    def _one(self, draw) -> dict:
        return {
            "text_ids": draw.integers(5, 30000, TEXT),
            "region_features": draw.random((self.regions, self.schema.region_size), np.float32),
            "region_boxes": draw.random((self.regions, 7), np.float32),
            "region_classes": draw.integers(1, self.schema.region_classes, self.regions),
            "region_scores": draw.random(self.regions, np.float32),
            "audio_features": draw.random((self.frames, self.schema.audio_size), np.float32),
            "image_codes": draw.integers(0, 8192, self.schema.num_codes),
        }


def parse(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("opt_jax.benchmark.cache_reading", description=__doc__)
    add = parser.add_argument
    add("--rows", type=int, default=500)
    add("--repetitions", type=int, default=5)
    add("--batch", type=int, default=16, help="rows of a batch of the loader")
    add("--threads", type=int, default=2, help="of the loader")
    add("--regions", type=int, default=36)
    add("--region_size", type=int, default=2048, help="width of a region's feature")
    add("--frames", type=int, default=500, help="audio frames: 10 seconds")
    add("--audio_size", type=int, default=768, help="width of an audio frame")
    add("--codes", type=int, default=64)
    return parser.parse_args(arguments)


def main(flags: argparse.Namespace) -> dict[str, float]:
    """Measures, prints, and returns median seconds by name: of all rows, and of the batches they fill."""
    schema = Schema(flags.region_size, 1601, flags.audio_size, flags.codes, cls_id=2)
    with tempfile.TemporaryDirectory() as directory:
        noise = Noise(schema, flags.regions, flags.frames)
        arguments = dict(split="train", schema=schema, examples_per_shard=100)
        build_cache(Words(flags.rows), noise, directory, {"made of": "noise"}, **arguments)
        return measure(FeatureCache(directory), flags)


def measure(cache: FeatureCache, flags: argparse.Namespace) -> dict[str, float]:
    places = []
    for shard in cache.manifest.shards:
        reader = ArrayRecordReader(os.fspath(cache.directory / shard.file), READER_OPTIONS)
        places += [(reader, position) for position in range(shard.rows)]
    order = np.random.default_rng(0).permutation(len(cache)).tolist()

    def read_alone():
        for row in order:
            reader, position = places[row]
            reader.read([position])

    def read_cache():
        for row in order:
            cache[row]

    seconds = interleaved({RAW: read_alone, CACHE: read_cache}, flags.repetitions)
    # By itself: it reads ahead while others are measured.
    bucket = (TEXT, -(-flags.frames // STACK))
    config = LoaderConfig(flags.batch, (bucket,), STACK, flags.regions, threads=flags.threads)
    batches = Loader(cache, config).from_step(0)
    count = len(cache) // flags.batch
    seconds |= interleaved({LOADER: lambda: [next(batches) for _ in range(count)]}, flags.repetitions)
    medians = middle(seconds)
    size = sum(shard.payload for shard in cache.manifest.shards)
    print(f"{len(cache)} rows of {size / len(cache):,.0f} bytes, {os.cpu_count()} cores")
    print(f"medians of {flags.repetitions} runs in turn")
    for name in (RAW, CACHE):
        spread = f"({len(cache) / max(seconds[name]):.0f} to {len(cache) / min(seconds[name]):.0f})"
        rate = len(cache) / medians[name]
        print(f"  {name:20}{rate:8.0f} rows/s {spread:16}{size / medians[name] / 2**20:8.0f} MiB/s")
    print(f"  {CACHE}, share of the rate of {RAW}: {medians[RAW] / medians[CACHE]:.1%}")
    rate = count / medians[LOADER]
    print(
        f"  {LOADER:20}{rate:8.1f} batches/s of {flags.batch} rows, {flags.threads} threads; {bucket[0]} word"
        f" pieces, {flags.regions} regions, {bucket[1]} audio positions"
    )
    return medians


if __name__ == "__main__":
    main(parse())
