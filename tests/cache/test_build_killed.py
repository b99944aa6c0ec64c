"""Builds that are killed and go on: the same bytes as without a kill, and no finished shard twice."""

import functools
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from patient_build import build, contents, stamps

SCRIPT = Path(__file__).parent / "patient_build.py"
TOUCHES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir")


def kill_at(number: int, directory: str) -> None:
    """This process kills itself the `number`-th time that it opens, renames, makes or removes a file."""
    count = itertools.count(1)

    def watch(event, arguments):
        opens = event == "open" and str(arguments[0]).startswith(directory)
        if (opens or event in TOUCHES) and next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def in_child(work) -> int:
    """Exit code of a forked process that does `work`; negative: the signal that ended it."""
    child = os.fork()
    if not child:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_everywhere(whole: str, directory: str, step: str) -> None:
    """For every `step`-th touch of a file by a build: one that is killed there, and one that goes on."""
    in_child(lambda: build(whole, rows=10))
    for number in itertools.count(1, int(step)):
        here = f"{directory}/{number}"

        def killed(number=number, here=here):
            kill_at(number, here)
            build(here, rows=10)

        code = in_child(killed)
        before = stamps(here)
        if code == 0:
            assert number > 40
            break
        assert code == -signal.SIGKILL
        assert in_child(functools.partial(go_on, here, before)) == 0
        assert contents(here) == contents(whole), f"killed at touch {number}"


def go_on(here: str, before: dict) -> None:
    """Fails where a finished shard is made again."""
    build(here, rows=10)
    after = {path.name: path.stat() for path in Path(here).iterdir()}
    assert all((after[name].st_ino, after[name].st_mtime_ns) == stamp for name, stamp in before.items())


@pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_every_touch_of_a_file(tmp_path, step):
    # From a program without threads, as it forks.
    arguments = [sys.executable, __file__, str(tmp_path / "whole"), str(tmp_path / "cut"), str(step)]
    (tmp_path / "cut").mkdir()
    subprocess.run(arguments, check=True, env=os.environ | {"PYTHONPATH": os.getcwd()})


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(("kills", "rows"), [(2, 30), pytest.param(10, 180, marks=pytest.mark.slow)])
def test_killed_at_random_moments(tmp_path, kills, rows, processes):
    build(tmp_path / "whole", rows=rows)
    cut, log, draw = tmp_path / "cut", tmp_path / "log", random.Random(kills + processes)
    command = [sys.executable, str(SCRIPT), str(cut), str(log), "0.05", str(processes), str(rows)]
    environment, finished, done = os.environ | {"PYTHONPATH": os.getcwd()}, {}, 0
    log.touch()
    for kill in range(kills):
        # Every third kill may fall before the first shard; the others when at least one more is finished.
        wanted, limit = len(log.read_text().splitlines()) + processes + 1, time.monotonic() + 60
        running = subprocess.Popen(command, env=environment)
        while kill % 3 != 2 and running.poll() is None and len(log.read_text().splitlines()) < wanted:
            assert time.monotonic() < limit
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.1))
        running.kill()
        done += running.wait() == 0
        found = stamps(cut)
        assert finished.items() <= found.items()
        finished = found
    assert finished and not done, "the build was over before the last kill"
    subprocess.run(command, check=True, env=environment)
    after = {path.name: path.stat() for path in cut.iterdir()}
    assert all((after[name].st_ino, after[name].st_mtime_ns) == stamp for name, stamp in finished.items())
    assert contents(cut) == contents(tmp_path / "whole")


if __name__ == "__main__":
    kill_everywhere(*sys.argv[1:])
