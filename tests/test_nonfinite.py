"""Steps that are not finite: skipped, counted and told; and the loss scale of float16."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from test_train import TASK, Data, assert_same, lines, losses, prepare, run

from opt_jax.train import NonFiniteError, Task


def test_a_poisoned_batch_changes_nothing_and_is_named(tmp_path, capsys):
    before = jax.device_get(run(tmp_path / "a", steps=2, decay="constant"))
    after = run(tmp_path / "b", data=Data(poisoned=(2, 3)), steps=4, decay="constant")
    assert_same(after, before)
    said = capsys.readouterr().out
    assert "step 3: the loss 'restore' is not finite; update skipped" in said
    assert "step 4:" in said
    line = lines(tmp_path / "b")[-1]
    assert line["skipped"] == 2 and line["total"] is None


def test_a_bad_gradient_is_named(tmp_path, capsys):
    def bent(params, batch, key, step):
        kernel = params["down"]["kernel"]
        root = jnp.sqrt(jnp.sum(jnp.square(kernel * (step != 1))))  # infinite slope where everything is zero
        return losses(params, batch, key, step) | {"small": (root, jnp.float32(1))}

    run(tmp_path, Task(TASK.init, bent, TASK.weights, prepare), steps=4)
    assert "step 2: the gradient of down/kernel is not finite" in capsys.readouterr().out
    assert lines(tmp_path)[-1]["skipped"] == 1


def test_too_many_in_a_row_end_the_run(tmp_path):
    with pytest.raises(NonFiniteError, match="step 5: the loss 'restore' is not finite, 3 steps in a row"):
        run(tmp_path, data=Data(poisoned=(0, 2, 3, 4, 5)), max_nonfinite=3)


def test_float16_halves_its_scale_until_it_fits(tmp_path):
    limit = 2.0**12

    def overflowing(params, batch, key, step):
        @jax.custom_vjp
        def half(x):
            return x

        # A backward pass in float16 whose range ends where the loss scale exceeds the limit.
        half.defvjp(lambda x: (x, None), lambda _, g: (jnp.where(jnp.abs(g) > limit, jnp.inf, g),))
        total, count = losses(params, batch, key, step)["restore"]
        return {"restore": (half(total / count) * 1.0, jnp.float32(1))}

    task = Task(TASK.init, overflowing, {"restore": 1.0}, prepare)
    before = run(tmp_path / "a", task, steps=3, precision="float16", log_every=1)
    logged = lines(tmp_path / "a")
    assert [line["loss_scale"] for line in logged] == [2.0**15, 2.0**14, 2.0**13]
    assert [line["skipped"] for line in logged] == [0, 0, 0]
    assert_same(before, run(tmp_path / "c", task, steps=1, precision="float16"))
    after = run(tmp_path / "b", task, steps=4, precision="float16", log_every=1)
    assert lines(tmp_path / "b")[-1]["loss_scale"] == limit
    assert np.any(np.asarray(after["up"]["kernel"]) != before["up"]["kernel"])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_float16_undoes_its_loss_scale(tmp_path, accumulation):
    # Without clipping and with a large epsilon, Adam's update depends on the size of the gradient.
    fields = dict(steps=3, clip_norm=0.0, epsilon=1.0, accumulation=accumulation, log_every=1)
    wanted = run(tmp_path / "a", **fields)
    found = run(tmp_path / "b", precision="float16", **fields)
    assert lines(tmp_path / "b")[-1]["loss_scale"] == 2.0**15
    assert_same(found, wanted, 1e-7)
    norms = [[line["gradient_norm"] for line in lines(tmp_path / run)] for run in "ab"]
    np.testing.assert_allclose(norms[1], norms[0], rtol=1e-5)


@pytest.mark.parametrize(
    "last, kept",
    [
        (3, dict(loss_scale=1, good_steps=0, skipped=1, consecutive=1, validations_since_best=1)),
        (6, dict(loss_scale=1, good_steps=2, skipped=2, consecutive=0, validations_since_best=4)),
    ],
)
def test_an_interrupted_float16_run_keeps_every_count(tmp_path, monkeypatch, last, kept):
    # The scale reaches 1, below which a bad step is skipped, with the first of three, and doubles soon.
    monkeypatch.setattr("opt_jax.state.INITIAL_LOSS_SCALE", 2.0)
    monkeypatch.setattr("opt_jax.state.GOOD_STEPS_TO_DOUBLE", 3)

    def best_at_step_2(params, batch, key, step):
        return {name: (jnp.square(step - 2.0), jnp.float32(1)) for name in ("restore", "small", "largest")}

    task = Task(TASK.init, losses, TASK.weights, prepare, evaluate_losses=best_at_step_2)
    fields = dict(steps=20, precision="float16", log_every=1, checkpoint_every=1, keep=20)
    fields |= dict(validate_every=1, early_stopping_patience=6, max_nonfinite=3)
    fields["validation"] = [next(Data().from_step(100))]

    def fail(step):
        if step == last:
            raise OSError("shard 5 is gone")

    def saved(workdir):
        """Of each checkpoint, by step: the hashes of all that is in the state, and the counts."""
        found = {}
        for place in filter(lambda path: path.name.isdigit(), (workdir / "checkpoints/test").iterdir()):
            record = ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(place / "record")
            counts = ocp.PyTreeCheckpointer().restore(place / "state")
            counts = {name: float(counts[name]) for name in kept if name in counts} | record["host"]
            found[int(place.name)] = record["hashes"], counts
        return found

    poisoned = (1, 2, 3)
    whole = run(tmp_path / "whole", task, Data(poisoned), **fields)
    with pytest.raises(OSError, match="shard 5 is gone"):
        run(tmp_path / "parts", task, Data(poisoned, fail), **fields)
    interrupted = saved(tmp_path / "parts")
    assert max(interrupted) == last
    assert {name: interrupted[last][1][name] for name in kept} == kept
    assert_same(run(tmp_path / "parts", task, Data(poisoned), **fields), jax.device_get(whole))
    wanted = saved(tmp_path / "whole")
    assert saved(tmp_path / "parts") == wanted and max(wanted) == 8
    assert wanted[8][1] == dict(
        loss_scale=2, good_steps=1, skipped=2, consecutive=0, best=0, validations_since_best=6, stopped=True
    )
