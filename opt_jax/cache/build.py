r"""Builds the feature cache of one split: `python -m opt_jax.cache.build --help` lists the flags.

    python -m opt_jax.cache.build --source=data/mine --split=train --out=caches/train --processes=4 \
        --detector=encoders/detector --wav2vec2=encoders/wav2vec2 --dvae=encoders/dvae \
        --tokenizer=encoders/tokenizer

Interrupted, the same command goes on where it was. With --runner an Apache Beam pipeline does the work; flags
that are not known here are Beam's then. Exit codes: 0 done; 1 --verify found damage; 2 the inputs do not fit
(the message says what to do); 130 and 143 interrupted.
"""

import argparse
import signal
import sys
from pathlib import Path

import numpy as np

from opt_jax.cache.builder import build_cache
from opt_jax.cache.extraction import Extraction
from opt_jax.cache.manifest import QUARANTINE, CacheError, Manifest
from opt_jax.cache.verify import verify
from opt_jax.data.augmentation import with_copies
from opt_jax.data.decoding import SAMPLE_RATE, SHORTEST
from opt_jax.data.sources import open_splits
from opt_jax.encoders.tokenizer import load_tokenizer

MIN_SECONDS = SHORTEST / SAMPLE_RATE


def parse(arguments=None) -> tuple[argparse.Namespace, list[str] | None]:
    """(flags, options of the Beam pipeline or None)."""
    parser = argparse.ArgumentParser(
        "opt_jax.cache.build",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # what is short for a flag here may be one of Beam's
    )
    add = parser.add_argument
    add("--source", required=True, help="see opt_jax/data/sources.py")
    add("--split", default="train", help="train, validation or test")
    add("--out", required=True, type=Path, help="directory of the cache, one for each split")
    add("--detector", type=Path, help="directory of a frozen encoder; without it, regions are a grid's cells")
    add("--grid_window", type=int, default=3, help="side of the square of cells that make a region, odd")
    add("--copies", type=int, default=0, help="of rows with a caption, picture and speech changed a little")
    add("--seed", type=int, default=0, help="of the copies")
    add("--wav2vec2", type=Path, help="directory of a frozen encoder; without it no row may have sound")
    add("--dvae", type=Path, help="directory of a frozen encoder; without it no row may have pixels")
    sizes = ("WIDTH", "CLASSES")
    add("--ready", nargs=2, type=int, metavar=sizes, help="of the regions that every picture comes with")
    add("--tokenizer", required=True, help="directory, or a name as bert-base-uncased")
    add("--dtype", default="float16", choices=["float16", "bfloat16"], help="of the features")
    add("--max_seconds", type=float, default=30.72, help="longer recordings are cut")
    add("--examples_per_shard", type=int, default=500)
    add("--processes", type=int, default=1, help="on this machine; of one accelerator, one is best")
    add("--runner", help="of Apache Beam, as DirectRunner; it wants the extra `beam`")
    add("--verify", action="store_true", help="re-read everything in the end")
    flags, rest = parser.parse_known_args(arguments)
    if rest and flags.runner is None:
        parser.error(f"unknown: {' '.join(rest)} (options of Apache Beam need --runner)")
    if flags.examples_per_shard < 1 or flags.processes < 1:
        parser.error("--examples_per_shard and --processes are at least 1")
    if flags.grid_window < 1 or flags.grid_window % 2 == 0 or flags.copies < 0 or flags.seed < 0:
        parser.error("--grid_window is odd, --copies and --seed are 0 or more")
    if not flags.max_seconds >= MIN_SECONDS:
        parser.error(f"--max_seconds is at least {MIN_SECONDS}, one frame of wav2vec 2.0")
    if flags.ready and min(flags.ready) < 1:
        parser.error("--ready: the width of the features and the number of classes are at least 1")
    if not flags.dvae and not flags.ready and flags.detector:
        parser.error("--detector looks at pictures in pixels, which need --dvae too")
    flags.ready = tuple(flags.ready) if flags.ready else None
    if flags.runner is not None and flags.processes > 1:
        parser.error("--processes is for this machine alone; with --runner give Beam's options")
    return flags, None if flags.runner is None else [f"--runner={flags.runner}", *rest]


def run(flags: argparse.Namespace, beam: list[str] | None) -> Manifest:
    """Opens everything and builds. Raises what `opt_jax.main.expected_errors` lists."""
    paths = [directory and directory.absolute() for directory in (flags.detector, flags.wav2vec2, flags.dvae)]
    words = load_tokenizer(flags.tokenizer)
    options = (words, flags.max_seconds, flags.dtype, flags.ready, flags.grid_window)
    extraction = Extraction(*paths, *options)
    source = open_splits(flags.source, [flags.split])[flags.split]  # its classes are those of training
    source = with_copies(source, flags.copies, flags.seed)
    for part, flag in (("audio", "wav2vec2"), ("image", "dvae")):
        if part in source.modalities and not vars(flags)[flag]:  # each would be set aside, one by one
            raise CacheError(
                f"{flags.source} has rows with {part}; name the encoder for them: --{flag}=DIRECTORY"
            )
    lacking = np.setdiff1d(source.rows_with("image"), source.rows_with("regions"))
    if flags.ready and not flags.detector and len(lacking):
        raise CacheError(
            f"{flags.source}: {len(lacking)} rows have pictures without ready regions; leave --ready out, or"
            " give these"
        )
    return build_cache(
        source,
        extraction,
        flags.out,
        extraction.fingerprint(source),
        split=flags.split,
        schema=extraction.schema(),
        examples_per_shard=flags.examples_per_shard,
        processes=flags.processes,
        beam=beam,
    )


def main(arguments=None) -> int:
    # Not above: it defines flags, which other programs that import this module have no use for.
    from opt_jax.main import expected_errors, refuse, stopped

    flags, beam = parse(arguments)
    try:
        manifest = run(flags, beam)
    except expected_errors() as error:
        refuse(error)
    except KeyboardInterrupt:
        stopped(flags.out, 130)
    except SystemExit as request:
        if request.code == 128 + signal.SIGTERM:
            stopped(flags.out, request.code)
        raise
    if manifest.num_quarantined > manifest.num_rows:
        print("warning: more rows were set aside than could be used")
    set_aside = f"; set aside: {manifest.num_quarantined} ({flags.out / QUARANTINE} says why)"
    print(
        f"{flags.out}: {manifest.num_rows} rows in {len(manifest.shards)} shards"
        + (set_aside if manifest.num_quarantined else "")
    )
    if not flags.verify:
        return 0
    problems = verify(flags.out)
    print("\n".join(problems) or "no damage found")
    return 1 if problems else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    sys.exit(main())
