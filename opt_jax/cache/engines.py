"""Three ways to run shard tasks: in this process, in several on this machine, on the workers of Apache Beam.

Each is a generator of the tasks as they get finished; closing it stops the work.
"""

import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from opt_jax.cache.manifest import CacheError
from opt_jax.cache.schema import Schema
from opt_jax.cache.shard import ShardTask, run_task

POLL_SECONDS = 1.0

_work: Callable[[ShardTask], None]  # of a worker process


def in_this_process(tasks: Sequence[ShardTask], source, extractor, schema: Schema) -> Iterator[ShardTask]:
    """One task after another."""
    for task in tasks:
        run_task(task, source, extractor, schema)
        yield task


def in_processes(
    tasks: Sequence[ShardTask], source, extractor, schema: Schema, processes: int
) -> Iterator[ShardTask]:
    """`processes` tasks at a time. Raises CacheError when a process dies."""
    context = multiprocessing.get_context("spawn")  # JAX has threads, which a fork would break
    work = functools.partial(run_task, source=source, extractor=extractor, schema=schema)
    watched, held = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(processes, context, _start_worker, (work, watched))
    try:
        futures = {pool.submit(_run_in_worker, task): task for task in tasks}
        for future in as_completed(futures):
            future.result()
            yield futures[future]
        pool.shutdown()
    except BrokenProcessPool as error:
        raise CacheError(
            "a worker process died (killed, short of memory, or as it says above); finished shards are kept:"
            " run the build again, with fewer processes if memory was short"
        ) from error
    finally:
        held.close()
        pool.shutdown(cancel_futures=True)
        watched.close()


def _start_worker(work: Callable[[ShardTask], None], watched) -> None:
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent, which gets it too, decides
    threading.Thread(target=_end_with_parent, args=(watched,), daemon=True).start()


def _end_with_parent(watched) -> None:
    """The parent holds the other end of the pipe: it is closed when the parent stops, or is killed."""
    watched.poll(None)
    os._exit(1)


def _run_in_worker(task: ShardTask) -> None:
    _work(task)


def on_beam(
    tasks: Sequence[ShardTask], source, extractor, schema: Schema, options: Sequence[str]
) -> Iterator[ShardTask]:
    """Tasks as elements of an Apache Beam pipeline. Raises CacheError where Apache Beam is missing."""
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise CacheError("Apache Beam is not installed; pip install -e '.[beam]'") from error
    work = functools.partial(run_task, source=source, extractor=extractor, schema=schema)
    errors: list[BaseException] = []

    def run():
        try:
            with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
                # Without the reshuffle a runner may fuse the steps and run all tasks in one worker.
                pipeline | beam.Create(tasks) | beam.Reshuffle() | beam.Map(work)
        except BaseException as error:
            errors.append(error)

    # Runners differ in what they tell while they run; the records of the shards tell with all of them.
    running = threading.Thread(target=run, daemon=True)
    running.start()
    waiting = list(tasks)
    while waiting and not errors:
        alive = running.is_alive()
        running.join(POLL_SECONDS)
        finished = {task for task in waiting if task.record.exists()}
        waiting = [task for task in waiting if task not in finished]
        yield from finished
        if waiting and not alive and not errors:
            raise CacheError(f"the Beam pipeline ended without {waiting[0].file}; run the build again")
    running.join()
    if errors:
        raise errors[0]
