"""The same shards from one process, several, and from Apache Beam; workers that die; builds that stop."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from patient_build import PatientExtractor, build, contents

from opt_jax.cache import CacheError

SCRIPT = Path(__file__).parent / "patient_build.py"


class WrongExtractor(PatientExtractor):
    def extract(self, triplets):
        return super().extract(triplets)[1:]


class DyingExtractor(PatientExtractor):
    def extract(self, triplets):
        if triplets[0].id == "tiny-006":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().extract(triplets)


def test_several_processes_make_the_same_bytes(tmp_path):
    build(tmp_path / "one")
    build(tmp_path / "two", PatientExtractor(tmp_path / "log"), processes=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert str(os.getpid()) not in {worker for worker, _ in lines}
    assert len(lines) == len({shard for _, shard in lines}) == 10


def test_beam_makes_the_same_bytes(tmp_path):
    pytest.importorskip("apache_beam")
    build(tmp_path / "one")
    build(tmp_path / "beam", PatientExtractor(tmp_path / "log"), beam=["--runner=DirectRunner"])
    assert contents(tmp_path / "one") == contents(tmp_path / "beam")
    shards = [line.split()[1] for line in (tmp_path / "log").read_text().splitlines()]
    assert len(set(shards)) == len(shards) == 10
    with pytest.raises(Exception, match="returned [12] results for [23] triplets"):
        build(tmp_path / "wrong", WrongExtractor(), beam=["--runner=DirectRunner"])


def test_without_beam_one_line_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(CacheError) as error:
        build(tmp_path, beam=["--runner=DirectRunner"])
    assert str(error.value) == "Apache Beam is not installed; pip install -e '.[beam]'"


def test_error_of_a_worker_comes_through(tmp_path):
    with pytest.raises(ValueError, match="returned [12] results for [23] triplets"):
        build(tmp_path, WrongExtractor(), processes=2)


def test_worker_that_dies_is_one_error_and_the_build_goes_on_later(tmp_path):
    with pytest.raises(CacheError, match="a worker process died"):
        build(tmp_path / "cut", DyingExtractor(), processes=2)
    build(tmp_path / "cut")
    build(tmp_path / "whole")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_workers_stop_with_the_build(tmp_path, number):
    log = tmp_path / "log"
    log.touch()
    # Shards of a minute: without the signal the workers would be busy for long.
    command = [sys.executable, str(SCRIPT), str(tmp_path / "cut"), str(log), "60", "2", "30"]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    running = subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for(lambda: len(log.read_text().splitlines()) == 2)
    workers = [int(line.split()[0]) for line in log.read_text().splitlines()]
    assert running.pid not in workers and all(map(alive, workers))
    if number == signal.SIGINT:
        os.killpg(running.pid, number)  # as a terminal does: all processes get it
    else:
        running.send_signal(number)
    _, errors = running.communicate(timeout=20)
    assert running.returncode == -number
    assert number == signal.SIGKILL or errors.count("Traceback") == 1 and "KeyboardInterrupt" in errors
    wait_for(lambda: not any(map(alive, workers)))


def wait_for(condition) -> None:
    limit = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
