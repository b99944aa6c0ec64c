import json

import pytest

from opt_jax.stages import StageMismatch, run_stage


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


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / "stage.json").write_text('{"inputs": ')
    with pytest.raises(StageMismatch, match="stage.json is damaged"):
        run_stage("data", tmp_path, {}, counting())
