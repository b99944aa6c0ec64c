"""A build that takes its time, in a program of its own, for the tests that kill it:

python patient_build.py DIRECTORY LOG SECONDS PROCESSES ROWS

builds the cache of ROWS tiny triplets, three in a shard; every shard takes SECONDS and adds a line to LOG:
'<process id> <id of the first triplet>'.
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for tiny_cache
from tiny_cache import SCHEMA, TinyExtractor, TinySource  # noqa: E402

from opt_jax.cache import build_cache  # noqa: E402


class NamedSource(TinySource):
    """With a name for quarantine.jsonl."""

    def origin(self, row: int) -> str:
        return "tiny"


class PatientExtractor:
    def __init__(self, log=os.devnull, seconds: float = 0.0, rejected: tuple[str, ...] = ("tiny-013",)):
        self.log, self.seconds, self.rejected = log, seconds, rejected

    def extract(self, triplets):
        with open(self.log, "a") as lines:
            lines.write(f"{os.getpid()} {triplets[0].id}\n")
        time.sleep(self.seconds)
        return TinyExtractor(self.rejected).extract(triplets)


def build(directory, extractor=None, rows: int = 30, **arguments):
    source, extractor = NamedSource(rows, broken=(4, 17)), extractor or PatientExtractor()
    arguments = {"split": "train", "schema": SCHEMA, "examples_per_shard": 3} | arguments
    return build_cache(source, extractor, directory, {"source": "tiny"}, **arguments)


def contents(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(directory).iterdir())}


def stamps(directory) -> dict[str, tuple]:
    """What would change if a finished shard was written again."""
    directory = Path(directory)
    found = {}
    for record in (directory / "records").glob("*.npz"):
        (shard,) = directory.glob(f"*array_record-{record.stem}-of-?????")
        status = shard.stat()
        found[shard.name] = status.st_ino, status.st_mtime_ns
    return found


if __name__ == "__main__":
    directory, log, seconds, processes, rows = sys.argv[1:]
    build(directory, PatientExtractor(log, float(seconds)), int(rows), processes=int(processes))
