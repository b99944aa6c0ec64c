import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

from opt_jax import main
from opt_jax.configuration import load
from opt_jax.stages import StageMismatch
from opt_jax.trained import WorkdirError

ROOT = Path(__file__).parents[1]
PRETRAIN = ROOT / "configs" / "pretrain.py"

# What `python -m opt_jax.main` does, with a pipeline that only shows what it was given.
PROGRAM = """
import json, sys, types
import jax
from absl import app
from opt_jax import main

def run(config, workdir):
    seen = {"steps": config.train.steps, "workdir": str(workdir), "locked": config.is_locked}
    seen["compiled"] = jax.config.jax_compilation_cache_dir
    (workdir / "seen.json").write_text(json.dumps(seen))

sys.modules["opt_jax.pipeline"] = types.SimpleNamespace(run=run)
app.run(main.main, flags_parser=main.parse_flags)
"""


def start(*arguments, directory):
    environment = dict(os.environ, PYTHONPATH=str(ROOT), JAX_PLATFORMS="cpu")
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=120
    )


def test_the_command_overrides_records_and_predicts(tmp_path):
    options = [f"--config={PRETRAIN}:small", "--workdir=runs/here"]
    options += ["--config.train.steps=700"]
    ended = start(*options, directory=tmp_path)
    assert ended.returncode == 0, ended.stderr
    workdir = tmp_path / "runs" / "here"
    seen = json.loads((workdir / "seen.json").read_text())
    assert seen == {
        "steps": 700,
        "workdir": "runs/here",
        "locked": True,
        "compiled": str(workdir / "compiled"),
    }
    written = json.loads((workdir / "config.json").read_text())
    assert written["train"]["steps"] == 700 and written["model"] == load(PRETRAIN, "small").model.to_dict()
    assert written["workdir"] == "runs/here" and written["model"]["dtype"] == "float32"
    assert not ended.stderr  # no logs of the libraries either
    seconds = load(PRETRAIN, "small").predicted_step_seconds
    assert "predicted minutes on a quiet 2-core machine" in ended.stdout and "; together " in ended.stdout
    assert seconds > 0 and f"pretrain {700 * seconds / 60:.1f}" in ended.stdout


def test_what_comes_after_pretraining_is_predicted_too():
    config = load(ROOT / "configs" / "finetune" / "captioning.py")
    config.train.steps, config.predicted_step_seconds = 300, 0.5
    config.predicted_minutes.update(before=1.0, evaluation=0.0)
    told = main.describe(config, Path("runs/here"))
    assert "captioning from runs/tiny in runs/here (" in told and "float32, seed 0)" in told
    assert "300 steps of 32 rows, shown I, A, I+A" in told
    assert "before 1.0, finetune 2.5; together 4 (not measured: evaluation)" in told
    assert "predicted" not in main.describe(load(ROOT / "configs/finetune/vqa.py", "base"), Path("x"))
    config = load(ROOT / "configs" / "ablation.py")
    config.steps, config.predicted_step_seconds = 100, 0.6
    told = main.describe(config, Path("runs/here"))
    assert "ablation of runs/tiny in runs/here" in told and "pretrain 6.0" in told
    assert "6 pre-trainings of 100 steps: full, without MAM, MLM, MVM, modality level, sample level" in told


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([f"--config={PRETRAIN}", "--config.train.step=7"], "'config.train.steps'?"),
        ([f"--config={PRETRAIN}", "--workdri=x"], "Did you mean: workdir ?"),
    ],
)
def test_a_wrong_command_gets_one_line_and_no_traceback(tmp_path, options, message):
    ended = start(*options, directory=tmp_path)
    assert ended.returncode == 2
    assert len(ended.stderr.strip().splitlines()) == 1 and message in ended.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config=configs/pretrain.py"),
        (["--config.train.steps=1", "--config=configs/pretrain.py"], "put it after"),
        (["--config=nowhere.py"], "no configuration file 'nowhere.py'"),
        (["--config", f"{PRETRAIN}:huge"], "unknown variant 'huge'"),
    ],
)
def test_a_missing_configuration_is_told(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        main.parse_flags(["main", *arguments])
    printed = capsys.readouterr().err
    assert end.value.code == 2 and message in printed and len(printed.splitlines()) == 1


@pytest.fixture
def run_with(tmp_path, monkeypatch):
    """main() in this process, with a given pipeline; returns the exit code."""
    config = load(PRETRAIN)
    monkeypatch.setattr(main, "CONFIG", types.SimpleNamespace(value=config))
    monkeypatch.setattr(main, "WORKDIR", types.SimpleNamespace(value=str(tmp_path)))
    monkeypatch.setattr(main, "keep_compiled_programs", lambda workdir: None)

    def call(run):
        monkeypatch.setitem(sys.modules, "opt_jax.pipeline", types.SimpleNamespace(run=run))
        monkeypatch.delattr("opt_jax.pipeline", raising=False)
        before = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit) as end:
                main.main(["main"])
        finally:
            signal.signal(signal.SIGTERM, before)
        return end.value.code

    return call


def raises(error):
    def run(config, workdir):
        raise error

    return run


def test_interruptions_say_how_to_go_on(run_with, capsys):
    assert run_with(raises(KeyboardInterrupt())) == 130
    assert "run the same command again" in capsys.readouterr().out
    assert run_with(lambda config, workdir: os.kill(os.getpid(), signal.SIGTERM)) == 143
    assert "run the same command again" in capsys.readouterr().out
    assert run_with(raises(SystemExit(3))) == 3
    assert "again" not in capsys.readouterr().out


def test_expected_errors_come_without_a_traceback_others_with(run_with, capsys):
    assert run_with(raises(StageMismatch("data: made by other inputs"))) == 2
    assert capsys.readouterr().err == "opt_jax: data: made by other inputs\n"
    with pytest.raises(ZeroDivisionError):
        run_with(raises(ZeroDivisionError()))


def test_a_refused_fine_tuning_leaves_no_configuration(tmp_path, monkeypatch):
    config = load(ROOT / "configs" / "finetune" / "captioning.py")
    config.pretrained = str(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(main, "keep_compiled_programs", lambda workdir: None)
    refusing = types.SimpleNamespace(run=raises(WorkdirError("holds no trained model")))
    monkeypatch.setitem(sys.modules, "opt_jax.finetuning", refusing)
    with pytest.raises(WorkdirError):
        main.run(config, tmp_path / "tuned")
    assert list((tmp_path / "tuned").iterdir()) == []


def test_a_workdir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(main.ConfigError, match="taken cannot be used: File exists; choose another"):
        main.make_workdir(tmp_path / "taken")


def test_a_coordinator_needs_its_numbers():
    distributed = load(PRETRAIN).distributed
    distributed.coordinator = "127.0.0.1:1234"
    with pytest.raises(main.ConfigError, match="process_id is -1"):
        main.start_processes(distributed)
