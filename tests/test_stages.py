import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from opt_jax.stages import StageMismatch, adding_seconds, noted_seconds, run_stage


def counting(outputs=None, fails=False):
    def build(directory):
        build.calls += 1
        (directory / f"part{build.calls}").touch()
        if fails:
            raise RuntimeError("interrupted")
        return outputs

    build.calls = 0
    return build


def test_a_built_stage_is_skipped_and_returns_its_outputs(tmp_path, capsys):
    build = counting({"rows": 3, "shape": (2, 2)})
    first = run_stage("data", tmp_path / "data", {"size": (1, 2)}, build)
    second = run_stage("data", tmp_path / "data", {"size": (1, 2)}, build)
    assert build.calls == 1
    assert first == second == {"rows": 3, "shape": [2, 2]}
    assert "data: up to date" in capsys.readouterr().out
    record = json.loads((tmp_path / "data" / "stage.json").read_text())
    assert record["inputs"] == {"size": [1, 2]} and record["outputs"] == first and record["seconds"] >= 0


def test_no_outputs_is_an_empty_record(tmp_path):
    assert run_stage("data", tmp_path, {}, counting()) == {}


def test_other_inputs_are_refused_with_their_difference(tmp_path):
    run_stage("data", tmp_path, {"a": {"b": 1, "same": 0}, "gone": 2}, counting())
    build = counting()
    with pytest.raises(StageMismatch) as error:
        run_stage("data", tmp_path, {"a": {"b": 7, "same": 0}, "new": None}, build)
    message = str(error.value)
    assert build.calls == 0
    assert "a.b: 1 -> 7" in message and "gone: 2 -> absent" in message and "new: absent -> null" in message
    assert "same" not in message and "--workdir" in message and str(tmp_path) in message


def test_an_interrupted_stage_goes_on_with_the_same_inputs_only(tmp_path):
    with pytest.raises(RuntimeError):
        run_stage("data", tmp_path, {"seed": 0}, counting(fails=True))
    assert not (tmp_path / "stage.json").exists()
    with pytest.raises(StageMismatch, match="seed: 0 -> 1"):
        run_stage("data", tmp_path, {"seed": 1}, counting())
    started = json.loads((tmp_path / "stage_inputs.json").read_text())
    started["seconds"] = 100.0  # as if the first part had taken so long
    (tmp_path / "stage_inputs.json").write_text(json.dumps(started))
    run_stage("data", tmp_path, {"seed": 0}, counting())
    assert json.loads((tmp_path / "stage.json").read_text())["seconds"] >= 100.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part1", "stage.json"]


DAMAGED = [b'{"inputs": ', b"\xff\xfe", b"[]", b"{}", b'{"inputs": {}, "seconds": 1}']


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_record_is_named(tmp_path, content):
    (tmp_path / "stage.json").write_bytes(content)
    with pytest.raises(StageMismatch, match="stage.json is damaged"):
        run_stage("data", tmp_path, {}, counting())


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b'{"seconds": null}'])
def test_a_damaged_note_of_the_time_costs_a_figure_only(tmp_path, content):
    path = tmp_path / "seconds.json"
    path.write_bytes(content)
    assert noted_seconds(path) == 0.0
    with adding_seconds(path):
        pass
    first = noted_seconds(path)
    with adding_seconds(path):
        pass
    assert 0.0 < first < noted_seconds(path) < 10.0


# Two processes that build one stage together and another by the first alone, then find both done.
PROCESS = """
import json, sys, time
from pathlib import Path
import jax
from ml_collections import ConfigDict
from opt_jax.main import start_processes
from opt_jax.stages import run_stage

coordinator, process, directory = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
start_processes(ConfigDict(dict(coordinator=coordinator, num_processes=2, process_id=process)))
calls = []

def build(path):
    calls.append(path.name)
    time.sleep(0.2 * process)
    return {"by": process}

seen = []
for _ in range(2):
    seen.append(run_stage("alone", directory / "alone", {"x": 1}, build, collective=False))
    seen.append(run_stage("together", directory / "together", {"x": 1}, build))
print("SEEN", json.dumps([calls, seen]))
"""


def test_processes_share_their_stages(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    root = str(Path(__file__).parents[1])
    environment = dict(os.environ, PYTHONPATH=root, JAX_PLATFORMS="cpu", XLA_FLAGS="")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, coordinator, str(number), str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    printed = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(printed)
    first, second = (json.loads(text.split("SEEN ")[1].splitlines()[0]) for text in printed)
    assert first == [["alone", "together"], [{"by": 0}] * 4]
    assert second == [["together"], [{"by": 0}] * 4]
    assert "up to date" in printed[0] and "up to date" not in printed[1]
