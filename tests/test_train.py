"""The training loop on a small linear model with axis names, on meshes of simulated devices."""

import os
import re
import shutil
import signal
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from opt_jax.checkpoints import Checkpoints, FingerprintMismatch
from opt_jax.metrics_log import read_metrics
from opt_jax.train import Task, train
from opt_jax.window import Window

B, T, D = 16, 3, 4


class Model(nn.Module):
    """Two dense layers with a norm between them; their axes are named as in the real models."""

    @nn.compact
    def __call__(self, x):
        kernel = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
        x = nn.LayerNorm(name="norm")(nn.Dense(8, kernel_init=kernel, name="up")(x))
        kernel = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("mlp", "embed"))
        return nn.Dense(D, kernel_init=kernel, name="down")(jax.nn.gelu(x))


class Data:
    """Batches that are functions of the step; rows differ in how many positions they count."""

    def __init__(self, poisoned=(), after=None):
        self.poisoned, self.after = poisoned, after

    def from_step(self, step):
        while True:
            generator = np.random.default_rng(step)
            x = generator.standard_normal((B, T, D)).astype(np.float32)
            x_valid = np.arange(T) < generator.integers(1, T + 1, B)[:, None]
            if step in self.poisoned:
                x[3] = np.nan
            if self.after is not None:
                self.after(step)
            yield {"x": x, "x_valid": x_valid}
            step += 1


def losses(params, batch, key, step):
    y = Model().apply({"params": params}, batch["noisy"])
    valid = batch["x_valid"]
    squares = jnp.sum(jnp.square(y - batch["x"]), -1)
    first = jnp.sum(jnp.abs(y[:, 0]), -1)
    return {
        "restore": (jnp.sum(squares * valid), jnp.sum(valid, dtype=jnp.float32)),
        "small": (jnp.sum(first), jnp.float32(first.shape[0])),
        "largest": (jnp.sum(jnp.max(y, (1, 2))), jnp.float32(y.shape[0])),
    }


def prepare(key, batch):
    return batch | {"noisy": batch["x"] + 0.1 * jax.random.normal(key, batch["x"].shape)}


TASK = Task(
    init=lambda key, batch: Model().init(key, batch["x"])["params"],
    losses=losses,
    weights={"restore": 1.0, "small": 0.1},
    prepare=prepare,
)


def run(workdir, task=TASK, data=None, mesh=(1, 1, 1), validation=None, initial_params=None, **fields):
    settings = dict(steps=6, batch_size=B, learning_rate=1e-2, warmup_steps=2, log_every=2)
    settings["mesh"] = dict(zip(("data", "fsdp", "tensor"), mesh, strict=True))
    config = ConfigDict(settings | fields)
    return train(
        task, data or Data(), config, workdir, name="test", seed=7, fingerprint={"cache": "a"},
        validation=validation, initial_params=initial_params,
    )  # fmt: skip


def lines(workdir):
    return [line for line in read_metrics(workdir / "metrics.jsonl") if "total" in line]


def assert_same(a, b, tolerance=0.0):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("reference")
    return jax.device_get(run(workdir)), lines(workdir)


def test_it_learns_and_logs(reference):
    params, logged = reference
    assert [line["step"] for line in logged] == [2, 4, 6]
    assert logged[-1]["restore"] < logged[0]["restore"]
    assert set(logged[0]) == {
        "name", "step", "restore", "small", "largest", "total", "learning_rate", "gradient_norm",
        "loss_scale", "step_seconds", "data_wait_seconds", "tokens_per_second", "skipped",
    }  # fmt: skip
    np.testing.assert_allclose(logged[0]["learning_rate"], 1e-2 * 2 / 3, rtol=1e-6)
    assert np.isfinite(logged[-1]["step_seconds"])


def test_a_loss_without_weight_gives_no_gradient(tmp_path, reference):
    def without(params, batch, key, step):
        return {name: pair for name, pair in losses(params, batch, key, step).items() if name != "largest"}

    task = Task(TASK.init, without, TASK.weights, prepare)
    assert_same(run(tmp_path, task), reference[0], 1e-6)


@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 2, 2)])
def test_meshes_give_the_same_losses(tmp_path, mesh, reference):
    params = run(tmp_path, mesh=mesh)
    for found, wanted in zip(lines(tmp_path), reference[1], strict=True):
        for name in ("restore", "small", "largest", "total", "gradient_norm"):
            np.testing.assert_allclose(found[name], wanted[name], rtol=2e-5)
    if mesh == (2, 2, 2):
        assert params["up"]["kernel"].sharding.shard_shape((D, 8)) == (2, 4)
    assert_same(params, reference[0], 1e-5)


def test_accumulation_changes_nothing_but_rounding(tmp_path, reference):
    assert_same(run(tmp_path, accumulation=4), reference[0], 1e-5)
    np.testing.assert_allclose(lines(tmp_path)[-1]["total"], reference[1][-1]["total"], rtol=1e-5)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_interrupted_by_a_signal_ends_as_an_uninterrupted_one(tmp_path, reference, number, code):
    calls, before = [], signal.getsignal(number)

    def terminate(step):
        calls.append(step)
        if len(calls) == 4:
            os.kill(os.getpid(), number)

    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, data=Data(after=terminate))
    assert stopped.value.code == code
    (saved,) = (int(path.name) for path in (tmp_path / "checkpoints/test").iterdir() if path.name.isdigit())
    assert 0 < saved < 6
    assert_same(run(tmp_path), reference[0])
    assert lines(tmp_path)[-1]["step"] == 6
    assert signal.getsignal(number) == before


def test_a_signal_during_the_last_save_ends_the_run_too(tmp_path, monkeypatch):
    close = Checkpoints.close

    def interrupted(self):
        os.kill(os.getpid(), signal.SIGTERM)
        close(self)

    monkeypatch.setattr(Checkpoints, "close", interrupted)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, steps=2)
    assert stopped.value.code == 143
    monkeypatch.undo()
    run(tmp_path, steps=2)
    assert len(lines(tmp_path)) == 1  # the work was done and saved


def test_what_happened_before_a_stop_is_logged(tmp_path):
    with pytest.raises(SystemExit):
        run(
            tmp_path,
            data=Data(after=lambda step: step == 3 and os.kill(os.getpid(), signal.SIGTERM)),
            log_every=50,
        )
    (line,) = lines(tmp_path)
    assert 0 < line["step"] < 6 and np.isfinite(line["total"])


def test_a_finished_run_returns_its_parameters_without_a_step(tmp_path, capsys):
    params = jax.device_get(run(tmp_path, steps=2))
    capsys.readouterr()
    assert_same(run(tmp_path, steps=2), params)
    assert "compiling" not in capsys.readouterr().out
    assert len(lines(tmp_path)) == 1


def test_another_optimizer_is_refused_with_a_difference(tmp_path):
    run(tmp_path, steps=2)
    with pytest.raises(FingerprintMismatch, match=r"training.learning_rate: 0.01 -> 0.02"):
        run(tmp_path, steps=2, learning_rate=2e-2)


def test_initial_parameters_override_by_path(tmp_path, capsys):
    bias = np.full(8, 3.0, np.float32)
    given = {"up": {"bias": bias}, "other": bias}
    params = run(tmp_path / "a", steps=1, learning_rate=0.0, initial_params=given)
    np.testing.assert_array_equal(params["up"]["bias"], bias)
    assert "1 of 6 parameters start from the 2 given" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"up/bias is \(8,\) in the model, \(9,\) in initial_params"):
        run(tmp_path / "b", initial_params={"up": {"bias": np.zeros(9)}})
    with pytest.raises(ValueError, match="no initial parameter matches"):
        run(tmp_path / "c", initial_params={"elsewhere": bias})


def test_validation_stops_early_and_stays_stopped(tmp_path):
    stream = Data().from_step(100)
    batches = [next(stream) for _ in range(2)]
    fields = dict(steps=20, learning_rate=0.0, validate_every=2, early_stopping_patience=2)
    run(tmp_path, validation=batches, **fields)
    logged = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "validation/total" in line]
    assert [line["step"] for line in logged] == [2, 4, 6]
    assert len({line["validation/total"] for line in logged}) == 1
    run(tmp_path, validation=batches, **fields)
    assert lines(tmp_path)[-1]["step"] == 6


def test_early_stopping_returns_the_best_parameters(tmp_path):
    def best_at_step_4(params, batch, key, step):
        far = jnp.square(step - 4.0)
        return {name: (far, jnp.float32(1)) for name in ("restore", "small", "largest")}

    task = Task(TASK.init, losses, TASK.weights, prepare, evaluate_losses=best_at_step_4)
    validation = [next(Data().from_step(100))]
    fields = dict(steps=20, decay="constant", validate_every=2, early_stopping_patience=2)
    found = jax.device_get(run(tmp_path / "a", task, validation=validation, **fields))
    assert lines(tmp_path / "a")[-1]["step"] == 8
    wanted = run(tmp_path / "b", steps=4, decay="constant")
    assert_same(found, jax.device_get(wanted))
    assert_same(
        run(tmp_path / "a", task, validation=validation, **fields), found
    )  # also when it is asked again


def test_early_stopping_forgets_the_best_of_a_deleted_training(tmp_path):
    def best_at(wanted):
        def evaluate(params, batch, key, step):
            far = jnp.square(step - float(wanted))
            return {name: (far, jnp.float32(1)) for name in ("restore", "small", "largest")}

        return Task(TASK.init, losses, TASK.weights, prepare, evaluate_losses=evaluate)

    validation = [next(Data().from_step(100))]
    fields = dict(decay="constant", validate_every=2, early_stopping_patience=2)
    run(tmp_path, best_at(6), validation=validation, steps=6, **fields)
    shutil.rmtree(tmp_path / "checkpoints" / "test")
    found = jax.device_get(run(tmp_path, best_at(2), validation=validation, steps=20, **fields))
    assert_same(found, jax.device_get(run(tmp_path / "b", steps=2, decay="constant")))


def test_each_shape_is_compiled_once(tmp_path, capsys):
    class Buckets(Data):
        def from_step(self, step):
            for number, batch in enumerate(super().from_step(step), start=step):
                yield {name: array[:, : 2 + number % 2] for name, array in batch.items()}

    traces = []

    def counted(params, batch, key, step):
        traces.append(batch["x"].shape)
        return losses(params, batch, key, step)

    run(tmp_path, Task(TASK.init, counted, TASK.weights, prepare), data=Buckets())
    assert sorted(traces) == [(B, 2, D), (B, 3, D)]
    assert capsys.readouterr().out.count("compiling for shapes") == 2


def test_an_unknown_field_and_a_missing_loss_are_named(tmp_path):
    with pytest.raises(KeyError, match="warmup"):
        run(tmp_path, warmup=3)
    with pytest.raises(KeyError, match="absent"):
        run(tmp_path, Task(TASK.init, losses, {"absent": 1.0}, prepare))


def test_a_loader_that_cannot_keep_up_is_told_once(tmp_path, capsys):
    run(tmp_path, data=Data(after=lambda step: time.sleep(0.2)), steps=8)
    waits = [line["data_wait_seconds"] for line in lines(tmp_path)]
    assert len(waits) == 4 and max(waits) > 0.1  # compiling takes longer, and the data get ahead meanwhile
    told = [line for line in capsys.readouterr().out.splitlines() if "waiting for data" in line]
    assert len(told) == 1 and re.search(r"warning: \d+% of the step time is spent waiting for data", told[0])


@pytest.mark.parametrize("share, warns", [(0.02, False), (0.04, True)])
def test_waiting_is_told_from_three_percent_of_the_step_time(tmp_path, capsys, monkeypatch, share, warns):
    class Timed(Window):
        def take(self):
            values, failures = super().take()
            return values | {"data_wait_seconds": share * values["step_seconds"]}, failures

    monkeypatch.setattr("opt_jax.train.Window", Timed)
    run(tmp_path, steps=2)
    assert ("waiting for data" in capsys.readouterr().out) == warns


def test_an_error_in_the_data_reaches_the_caller(tmp_path):
    def fail(step):
        if step == 3:
            raise OSError("shard 5 is gone")

    with pytest.raises(OSError, match="shard 5 is gone"):
        run(tmp_path, data=Data(after=fail))
