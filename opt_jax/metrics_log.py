"""What a training reports: metrics.jsonl, TensorBoard events, and progress on the console."""

import json
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

SPARSE_SECONDS = 10.0


class _Lines:
    """A stream for tqdm where there is no terminal: every refresh is a line of its own."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> None:
        text = text.strip()
        if text:
            self._stream.write(text + "\n")

    def flush(self) -> None:
        self._stream.flush()


def progress(
    iterable: Iterable | int | None = None,
    desc: str = "",
    total: int | None = None,
    initial: int = 0,
    disable: bool = False,
) -> tqdm:
    """A tqdm bar with rate and time left, over an iterable or a plain number of things to `update`.

    Without a terminal it prints a line about every ten seconds.
    """
    if isinstance(iterable, int):
        iterable, total = None, iterable
    terminal = sys.stderr.isatty()
    return tqdm(
        iterable,
        desc=desc,
        total=total,
        initial=initial,
        dynamic_ncols=terminal,
        ncols=None if terminal else 100,
        mininterval=0.2 if terminal else SPARSE_SECONDS,
        maxinterval=SPARSE_SECONDS,
        file=sys.stderr if terminal else _Lines(sys.stderr),
        disable=disable,
    )


def finite_or_none(value: Any) -> Any:
    """JSON has no NaN: what is not finite becomes null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class MetricsLog:
    """Appends to `workdir`/metrics.jsonl and writes TensorBoard events to `workdir`/tensorboard/`name`.

    Trainings with different names may share the file. Lines of this name after step `start` come from a run
    that ended between a log step and its last checkpoint; they are dropped, as they will be written again.
    With `writes` False (all processes but one) nothing is written.
    """

    def __init__(self, workdir: Path, name: str, start: int = 0, writes: bool = True):
        from tensorboardX import SummaryWriter  # slow to import; readers of the log do not need it

        self.name = name
        self._file = self._events = None
        if not writes:
            return
        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / "metrics.jsonl"
        kept = [line for line in read_metrics(path) if line["name"] != name or line["step"] <= start]
        aside = path.with_suffix(".partial")
        aside.write_text("".join(json.dumps(line) + "\n" for line in kept))
        aside.replace(path)
        self._file = path.open("a")
        self._events = SummaryWriter(str(workdir / "tensorboard" / name), purge_step=start + 1)

    def write(self, step: int, values: Mapping[str, float | int]) -> None:
        """One line {"name", "step", **values}, and one TensorBoard scalar per finite value."""
        if self._file is None:
            return
        values = {key: finite_or_none(value) for key, value in values.items()}
        self._file.write(json.dumps({"name": self.name, "step": step, **values}) + "\n")
        self._file.flush()
        for key, value in values.items():
            if value is not None:
                self._events.add_scalar(key, value, step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._events.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics.jsonl; a last line cut off by a crash is left out."""
    if not Path(path).exists():
        return []
    text = Path(path).read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
