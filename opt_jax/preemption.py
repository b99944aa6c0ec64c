"""Ending a run on request: SIGTERM (clusters send it before they take a machine back) and Ctrl-C."""

import contextlib
import signal
import threading
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Yields a list that receives the number of each SIGTERM or Ctrl-C; a second Ctrl-C interrupts at once.

    Only the main thread can listen; in others the list stays empty. The handlers before are put back.
    """
    received: list[int] = []

    def note(number, _):
        if number == signal.SIGINT and received:
            raise KeyboardInterrupt
        received.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def agreed(*values: int, ask: bool) -> list[int]:
    """The largest of each value over all processes, so that all of them stop and save at the same step.

    Asking is a collective: every process must do so at the same step. Without `ask`, many processes get
    zeros; a single process has nobody to agree with and always gets its own values.
    """
    if jax.process_count() == 1:
        return list(values)
    if not ask:
        return [0] * len(values)
    return np.max(multihost_utils.process_allgather(np.array(values)), axis=0).tolist()
