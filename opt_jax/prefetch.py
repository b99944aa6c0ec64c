"""The next batch is fetched and placed while the step runs."""

import queue
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

AHEAD = 2


class Prefetch:
    """Iterates over `place(item)` for the items, up to `AHEAD` of them made in advance by a thread.

    `waited` is the seconds that the last `next` had to wait. An exception of the thread is raised by `next`.
    Use it as a context manager: leaving it ends the thread.
    """

    def __init__(self, items: Iterable[Any], place: Callable[[Any], Any]):
        self.waited = 0.0
        self._queue: queue.Queue = queue.Queue(AHEAD)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(iter(items), place), daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def __iter__(self):
        return self

    def __next__(self):
        begin = time.perf_counter()
        item, error = self._queue.get()
        self.waited = time.perf_counter() - begin
        if error is not None:
            raise error
        return item

    def _fill(self, items, place):
        try:
            for item in items:
                self._put((place(item), None))
                if self._stop.is_set():
                    break
            else:
                self._put((None, StopIteration()))
        except Exception as error:
            self._put((None, error))

    def _put(self, entry):
        while not self._stop.is_set():
            try:
                return self._queue.put(entry, timeout=0.1)
            except queue.Full:
                continue
