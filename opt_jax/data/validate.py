"""Reads every sample of a source once: what is there, what is wrong, what its features will cost.

    python -m opt_jax.data.validate SOURCE [--split=all] [--rows=N] [--quick] [--page=FILE] [--problems=FILE]

SOURCE as in `opt_jax.data.sources`. Exit status: 0 all rows are usable; 1 some are not; 2 the source cannot
be opened; 130 stopped by Ctrl-C, after printing what was found so far.
"""

import argparse
import bisect
import collections
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

from opt_jax.data.mixture import Mixture, Part
from opt_jax.data.rows import RowSource
from opt_jax.data.sources import SPLITS, open_split, open_splits
from opt_jax.data.triplet import Source, SourceError, UnusableSampleError
from opt_jax.data.validate_summary import Findings, lines
from opt_jax.data.validate_tally import Place, Tally
from opt_jax.metrics_log import progress

CHUNK, QUICK_CHUNK = 64, 2000  # rows that a process reads before it reports
FIRST = 20  # problems shown
MARK = b"made by opt_jax.data.validate"  # at the beginning of pages
INTERRUPTED = "interrupted"

_sources: Mapping[str, Source] = {}  # of a reading process


def validate(
    sources: Mapping[str, Source],
    *,
    rows: int | None = None,
    quick: bool = False,
    processes: int | None = None,
    problems: Path | None = None,
) -> Findings:
    """Reads the rows of some splits.

    Args:
      sources: by split. rows: of each split so many only, drawn by chance, the same each time. quick: look at
        the list, open no files. processes: by default one a core; 1 reads in this process. problems: a file
        for all unusable rows, as JSON lines {"split", "row", "list_row", "id", "origin", "part", "reason"}.

    Ctrl-C ends the reading; `Findings.stopped` then says so. Raises SourceError, OSError (for `problems`).
    """
    chosen = {split: _choose(len(source), rows) for split, source in sources.items()}
    total = sum(map(len, chosen.values()))
    findings = Findings(sources, chosen, Tally(), np.zeros(total, np.uint64), quick=quick)
    processes = processes or os.cpu_count() or 1
    size = max(1, min(QUICK_CHUNK if quick else CHUNK, total // (8 * processes)))
    tasks = (
        (split, places[start : start + size], quick)
        for split, places in chosen.items()
        for start in range(0, len(places), size)
    )
    began = time.monotonic()
    results = _results(sources, tasks, processes)
    try:
        with open(problems or os.devnull, "w") as file, progress(total, "list" if quick else "rows") as bar:
            for part in results:
                findings.add(part, FIRST)
                file.writelines(json.dumps(problem) + "\n" for problem in part.problems)
                bar.update(len(part.captions))
    except KeyboardInterrupt:
        findings.stopped = INTERRUPTED
    except BrokenProcessPool:
        findings.stopped = (
            "a reading process died, of too little memory or of a file that crashes its decoder"
        )
    finally:
        results.close()
    findings.took = time.monotonic() - began
    return findings


def _choose(count: int, rows: int | None) -> np.ndarray:
    if rows is None or rows >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, rows, replace=False))


def _results(sources, tasks: Iterator, processes: int) -> Generator[Tally, None, None]:
    """The tally of each task, in order."""
    if processes == 1:
        _start(sources)
        return (_read(*task) for task in tasks)
    pool = ProcessPoolExecutor(processes, initializer=_start, initargs=(sources, True))
    # Here the processes start: before the progress bar's thread, as forks and threads go badly together.
    ahead = collections.deque(pool.submit(_read, *task) for task in itertools.islice(tasks, 4 * processes))
    return _in_order(pool, ahead, tasks)


def _in_order(
    pool: ProcessPoolExecutor, ahead: collections.deque, tasks: Iterator
) -> Generator[Tally, None, None]:
    """Results of the tasks that are ahead, and of the others, of which one is begun whenever one is done."""
    try:
        while ahead:
            yield ahead.popleft().result()
            ahead.extend(pool.submit(_read, *task) for task in itertools.islice(tasks, 1))
    finally:
        pool.shutdown(cancel_futures=True)


def _start(sources, own_process: bool = False) -> None:
    global _sources
    _sources = sources
    if own_process:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process decides


def _read(split: str, rows: np.ndarray, quick: bool) -> Tally:
    """The tally of some rows of a split, read one after the other."""
    source, tally = _sources[split], Tally()
    for row in map(int, rows):
        listed, list_row = _listed(source, row)
        place = Place(split, source.origin(row), row, list_row)
        try:
            triplet = source.read(row, image=not quick, audio=not quick)
            named = _named(listed, list_row) if quick else ()
            tally.add(triplet, source.class_names, place, named)
        except UnusableSampleError as error:
            tally.add_problem(error, place)
        except SourceError:
            raise
        except Exception as error:  # a source may raise nothing else: this would end a run
            reason = f"raises {type(error).__name__}: {error}"
            tally.add_problem(UnusableSampleError(f"row {row}", "row", reason), place)
    return tally


def _listed(source: Source, row: int) -> tuple[Source, int]:
    """The list that a row stands in, and its number there."""
    while isinstance(source, Part | Mixture):
        if isinstance(source, Part):
            source, row = source.source, int(source.rows[row])
        else:
            starts = [0, *itertools.accumulate(map(len, source.sources))]
            number = bisect.bisect_right(starts, row) - 1
            source, row = source.sources[number], row - starts[number]
    return source, row


def _named(source: Source, row: int) -> list[str]:
    """The parts for which a row names a file; [] in a source that is no list."""
    if not isinstance(source, RowSource):
        return []
    named = source.row(row)
    parts = {"image": named.image or named.features, "audio": named.audio}
    return [part for part in parts if parts[part] is not None]


def _ours(path: Path) -> bool:
    """Whether a file is a list of problems or a page of an earlier run, and no list that is to be read."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        beginning = file.read(400)
    problems = beginning.startswith(b'{"split": ') and b'"list_row": ' in beginning
    return not beginning or problems or MARK in beginning


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m opt_jax.data.validate",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("source")
    parser.add_argument("--split", choices=(*SPLITS, "all"), default="all")
    parser.add_argument("--rows", type=int, help="of each split, drawn by chance")
    parser.add_argument("--quick", action="store_true", help="look at the list only, open no files")
    parser.add_argument("--processes", type=int, help="default: one a core")
    parser.add_argument("--page", type=Path, help="HTML file of samples, problems and counts")
    parser.add_argument("--problems", type=Path, help="JSON lines of all unusable rows")
    options = parser.parse_args(arguments)
    if any(number is not None and number < 1 for number in (options.rows, options.processes)):
        parser.error("--rows and --processes are at least 1")
    for path in (options.page, options.problems):  # hours later is too late to say so
        if path and not path.parent.is_dir():
            parser.error(f"{path.parent} is no folder")
        if path and path.exists() and not _ours(path):
            parser.error(f"{path} exists and was not made by this program; name another file")
    sys.stdout.reconfigure(errors="replace")
    try:
        if options.split == "all":
            sources = open_splits(options.source)
        else:
            sources = {options.split: open_split(options.source, options.split)}
        if not sum(map(len, sources.values())):
            raise SourceError(f"{options.source} holds no rows")
        findings = validate(
            sources,
            rows=options.rows,
            quick=options.quick,
            processes=options.processes,
            problems=options.problems,
        )
    except (SourceError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # while the list was being read
        return 130
    print("\n".join(lines(options.source, findings)))
    if options.page:
        from opt_jax.data.validate_page import write_page  # jinja is of no use without a page

        write_page(options.page, options.source, findings)
        print(f"\n{options.page}")
    return 130 if findings.stopped == INTERRUPTED else 1 if findings.tally.unusable or findings.stopped else 0


if __name__ == "__main__":
    sys.exit(main())
