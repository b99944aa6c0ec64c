"""The steps since the last log line: their measures stay on the devices until the line is due."""

import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

# Steps that may be queued on the device. One hides the host's work; more would only hold memory.
IN_FLIGHT = 2


class NonFiniteError(FloatingPointError):
    """Too many steps in a row had a loss or gradient that is not finite."""


class Window:
    """Collects the measures of steps (see `step.make_step`) and times steps by when they complete.

    The time of compilation, validation and checkpoints is left out.
    """

    def __init__(self):
        self.timed = 0  # steps timed since the start
        self.seconds = 0.0  # and their time
        self._seconds_per_step = float("nan")  # of the last window that had timed steps
        self._in_flight: deque = deque()
        self._completed_at = time.perf_counter()
        self._reset()

    def _reset(self) -> None:
        self._measures: list[Mapping[str, Any]] = []
        self._waits: list[float] = []
        self._begin = (self.timed, self.seconds)

    def add(self, measures: Mapping[str, Any], waited: float, compiled: bool) -> None:
        """Takes a step just dispatched, and waits for the one `IN_FLIGHT` before it."""
        self._measures.append(measures)
        self._in_flight.append(measures["total"])
        if compiled:
            self.pause()
            return
        self._waits.append(waited)
        if len(self._in_flight) > IN_FLIGHT:
            self._complete(1)

    def pause(self) -> None:
        """Waits for all steps and restarts the clock; what happened since the last step is not timed."""
        jax.block_until_ready(list(self._in_flight))
        self._in_flight.clear()
        self._completed_at = time.perf_counter()

    def _complete(self, number: int) -> None:
        for _ in range(number):
            jax.block_until_ready(self._in_flight.popleft())
        now = time.perf_counter()
        self.seconds += now - self._completed_at
        self.timed += number
        self._completed_at = now

    def failures_in_a_row(self) -> int:
        """Up to the newest step that is known to be complete: asking waits for none that is queued."""
        complete = len(self._measures) - len(self._in_flight)
        return int(self._measures[complete - 1]["consecutive"]) if complete else 0

    def take(self) -> tuple[dict[str, float], list[tuple[int, int, int]]]:
        """(values of the log line, failures), and starts a new window. Waits for the steps queued.

        A loss is the sum of the window's sums over the sum of its counts; steps whose value is not finite are
        left out (NaN if none remains). A failure is (position in the window, index of what was not finite,
        failures in a row); an overflow that only lowers the loss scale is none.
        """
        self._complete(len(self._in_flight))
        measures = jax.device_get(self._measures)
        timed, seconds = self.timed - self._begin[0], self.seconds - self._begin[1]
        if timed:
            self._seconds_per_step = seconds / timed
        names = sorted(measures[0]["losses"])
        tokens = float(np.mean([each["tokens"] for each in measures]))
        losses = {name: _ratio([each["losses"][name] for each in measures]) for name in names}
        last = measures[-1]
        values = {
            "total": _finite_mean([each["total"] for each in measures]),
            "learning_rate": float(last["learning_rate"]),
            "gradient_norm": _finite_mean([each["gradient_norm"] for each in measures]),
            "loss_scale": float(last["loss_scale"]),
            "step_seconds": self._seconds_per_step,
            "data_wait_seconds": float(np.mean(self._waits)) if self._waits else 0.0,
            "tokens_per_second": tokens / self._seconds_per_step,
            "skipped": int(last["skipped"]),
        }
        clash = sorted((values.keys() | {"name", "step"}) & losses.keys())
        if clash:
            raise ValueError(f"losses may not be called {clash}: metrics.jsonl has columns of these names")
        failures = [
            (position, int(each["nonfinite"]), int(each["consecutive"]))
            for position, each in enumerate(measures)
            if each["nonfinite"] >= 0 and each["consecutive"] > 0
        ]
        self._reset()
        return losses | values, failures


def describe_failures(
    failures: list[tuple[int, int, int]], names: list[str], first_step: int, limit: int
) -> list[str]:
    """A sentence per failure of a window that began with `first_step`; `names` are `step.suspect_names`.

    Raises NonFiniteError at the `limit`-th failure in a row.
    """
    said = []
    for position, culprit, consecutive in failures:
        sentence = f"step {first_step + position}: {names[culprit]} is not finite"
        if consecutive >= limit:
            raise NonFiniteError(
                f"{sentence}, {consecutive} steps in a row; none of them changed the parameters. Lower "
                "learning_rate or look at their data; the same command goes on from the last checkpoint."
            )
        said.append(f"{sentence}; update skipped")
    return said


def _ratio(pairs: list[tuple[Any, Any]]) -> float:
    finite = [(float(total), float(count)) for total, count in pairs if np.isfinite(total)]
    count = sum(count for _, count in finite)
    return sum(total for total, _ in finite) / count if count else float("nan")


def _finite_mean(values: list[Any]) -> float:
    finite = [float(value) for value in values if np.isfinite(value)]
    return float(np.mean(finite)) if finite else float("nan")
