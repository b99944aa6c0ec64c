"""The training loop: pre-training, fine-tuning and the encoders' own training all go through `train`.

It knows nothing of the task it trains. In the order in which things happen: the shapes of the state from the
first batch, its shardings from the axis names, the state itself (fresh, or from the last checkpoint), then
steps. The host never waits for the step it has just started; it reads measures only when a log line is due.
Random keys are functions of (seed, step) and the position in the data is the step, so a checkpoint holds the
state and the early-stopping record, and nothing else.
"""

import contextlib
import itertools
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from opt_jax.checkpoints import Checkpoints, abstract_state
from opt_jax.data.plan import host_slice
from opt_jax.metrics_log import MetricsLog, progress
from opt_jax.optimizer import make_optimizer, weight_decay_mask
from opt_jax.partitioning import make_mesh, place_batch, replicated, unbox
from opt_jax.preemption import agreed, stop_signals
from opt_jax.prefetch import Prefetch
from opt_jax.state import fresh, shardings, with_initial
from opt_jax.step import Task, make_evaluation, make_step, suspect_names, total_loss
from opt_jax.window import NonFiniteError, Window, describe_failures

__all__ = ["Batches", "NonFiniteError", "OwnRows", "Task", "default_config", "train"]

TIMED_STEPS_TO_PREDICT = 10
WAIT_WORTH_A_WARNING = 0.03  # of the step time


class Batches(Protocol):
    """Training data whose order is a function of the step."""

    def from_step(self, step: int) -> Iterator[dict[str, np.ndarray]]:
        """Batches without end, the first being that of `step`: this process's rows, along axis 0."""


class OwnRows:
    """This process's rows of a source whose batches are whole in every process."""

    def __init__(self, whole: Batches):
        self._whole = whole

    def from_step(self, step: int) -> Iterator[dict[str, np.ndarray]]:
        for batch in self._whole.from_step(step):
            yield {
                name: host_slice(rows, jax.process_index(), jax.process_count())
                for name, rows in batch.items()
            }


def default_config() -> ConfigDict:
    """All fields that `train` reads; a config given to it may leave out what it does not change."""
    return ConfigDict(
        dict(
            steps=1000,
            batch_size=32,
            learning_rate=5e-5,
            warmup_steps=0,
            decay="linear",  # 'linear', 'cosine' or 'constant'
            end_learning_rate_fraction=0.0,
            beta1=0.9,
            beta2=0.98,
            epsilon=1e-6,
            weight_decay=0.01,
            clip_norm=1.0,  # 0: no clipping
            accumulation=1,  # microbatches per step
            precision="float32",  # 'float16' scales the loss; the compute dtype is the model's matter
            log_every=50,
            checkpoint_every=1000,
            checkpoint_minutes=10.0,
            keep=2,
            validate_every=0,  # 0: never
            early_stopping_patience=0,  # validations without a better total; 0: never stops early
            max_nonfinite=10,
            mesh=dict(data=-1, fsdp=1, tensor=1),  # -1: the remaining devices
        )
    )


def _complete(config: ConfigDict, name: str) -> ConfigDict:
    unknown = sorted(set(config) - set(default_config()))
    if unknown:
        raise KeyError(f"{name}: unknown train fields {unknown}; known are {sorted(default_config())}")
    complete = default_config()
    complete.update(config)
    return complete


def _fingerprint(given: Mapping[str, Any], config: ConfigDict, seed: int) -> dict[str, Any]:
    """What a training cannot change midway: the caller's inputs, the batch size, the optimizer."""
    free = {"log_every", "checkpoint_every", "checkpoint_minutes", "keep", "max_nonfinite", "mesh"}
    if config.decay == "constant":
        free.add("steps")  # only a decaying rate depends on where it ends
    training = {field: value for field, value in config.to_dict().items() if field not in free}
    return {"inputs": dict(given), "training": training | {"seed": seed}}


def _initialize(task: Task, config: ConfigDict, batch: Mapping[str, jax.Array], seed: int, mesh: Mesh):
    """(create() -> State, abstract State, its shardings, the optimizer), from the shapes of a batch."""
    shapes = {name: (array.shape, array.dtype) for name, array in batch.items()}

    def init():
        return task.init(jax.random.key(seed), {name: jnp.zeros(*shape) for name, shape in shapes.items()})

    boxed = jax.eval_shape(init)
    optimizer = make_optimizer(config, weight_decay_mask(boxed))
    places = shardings(mesh, boxed, optimizer, config.precision)
    create = jax.jit(lambda: fresh(unbox(init()), optimizer, config.precision), out_shardings=places)
    return create, abstract_state(jax.eval_shape(create), places), places, optimizer


def _validate(evaluate, task, params, batches, step, seed, mesh) -> dict[str, float]:
    """{"validation/<loss>": mean, "validation/total": ...} over all batches, with the same keys each time."""
    sums = None
    for number, batch in enumerate(batches):
        key = jax.random.fold_in(jax.random.key(seed), number)
        losses = evaluate(params, place_batch(mesh, batch), key, jnp.int32(step))
        sums = losses if sums is None else jax.tree.map(jnp.add, sums, losses)
    sums = jax.device_get(sums)
    total = total_loss(sums, {name: count for name, (_, count) in sums.items()}, task.weights)
    means = {f"validation/{name}": float(s) / max(float(c), 1.0) for name, (s, c) in sorted(sums.items())}
    return means | {"validation/total": float(total)}


def _next_stopping(stopping: Mapping[str, Any], total: float, patience: int) -> dict[str, Any]:
    """The early-stopping record after a validation; a total that is not finite is no improvement."""
    better = total < stopping["best"]
    since = 0 if better else stopping["validations_since_best"] + 1
    best = total if better else stopping["best"]
    return {"best": best, "validations_since_best": since, "stopped": 0 < patience <= since}


def _chosen(state: Any, best: Checkpoints | None, abstract: Any) -> Any:
    """The parameters of the best validation where early stopping kept them, else the last."""
    if best is None or best.latest() is None:
        return state.params
    best.wait()
    return best.restore(best.latest(), abstract)[0].params


def _leave(signals: list[int]) -> None:
    """Ends the run if it was asked to while the last step was being saved or parameters were read."""
    if signals:
        raise SystemExit(128 + max(signals))


def train(
    task: Task,
    batches: Batches,
    config: ConfigDict,
    workdir: Path,
    *,
    name: str,
    seed: int,
    fingerprint: dict,
    initial_params: Mapping[str, Any] | None = None,
    validation: list | None = None,
    mesh: Mesh | None = None,
) -> Any:
    """Trains to `config.steps` and returns the parameters, unboxed. With validation and a patience it ends
    when validation stops improving, and returns the parameters that did best there.

    Goes on from the newest checkpoint under workdir/checkpoints/name; a finished training returns its
    parameters without a step. `fingerprint` (JSON-able) tells the inputs; resuming with another raises
    FingerprintMismatch. `initial_params` override fresh parameters of the same path. SIGTERM and Ctrl-C
    finish the step, save, and raise SystemExit(143 or 130). NonFiniteError after `config.max_nonfinite`
    consecutive steps that were not finite. Logs to workdir/metrics.jsonl and workdir/tensorboard.
    """
    config = _complete(config, name)
    mesh = make_mesh(config.mesh) if mesh is None else mesh
    directory = Path(workdir) / "checkpoints" / name
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        signals = stack.enter_context(stop_signals())
        stack.push(lambda kind, *_: _leave(signals) if kind is None else None)  # after everything is closed
        checkpoints = Checkpoints(directory, config.keep, _fingerprint(fingerprint, config, seed))
        stack.callback(checkpoints.close)
        best = None  # only early stopping looks back
        if validation and config.early_stopping_patience:
            best = Checkpoints(directory.with_name(f"{name}_best"), 1, checkpoints.fingerprint)
            stack.callback(best.close)
        start = checkpoints.latest() or 0
        if best:
            best.discard_after(start)  # of an earlier training, or of steps that are done again
        source = batches.from_step(start)
        first = next(source)
        create, abstract, places, optimizer = _initialize(task, config, place_batch(mesh, first), seed, mesh)
        stopping = {"best": math.inf, "validations_since_best": 0, "stopped": False}
        if start:
            state, stopping = checkpoints.restore(start, abstract)
            ended = start >= config.steps or stopping["stopped"]
            said = f"up to date ({directory})" if ended else f"goes on from step {start} of {config.steps}"
            if jax.process_index() == 0:
                print(f"{name}: {said}", flush=True)
        else:
            state = create()
            if initial_params is not None:
                state = state.replace(params=with_initial(state.params, initial_params, name))
        if start >= config.steps or stopping["stopped"]:
            return _chosen(state, best, abstract)

        everywhere = replicated(mesh)
        step = make_step(task, config, optimizer, seed, mesh)
        step = jax.jit(step, donate_argnums=0, out_shardings=(places, everywhere))
        evaluate = jax.jit(make_evaluation(task), out_shardings=everywhere)
        feed = Prefetch(itertools.chain([first], source), lambda batch: place_batch(mesh, batch))
        stack.enter_context(feed)
        speaks = jax.process_index() == 0
        log = MetricsLog(workdir, name, start, writes=speaks)
        stack.callback(log.close)
        bar = stack.enter_context(progress(config.steps, desc=name, initial=start, disable=not speaks))
        say = bar.write if speaks else (lambda sentence: None)
        suspects = suspect_names(task.weights, state.params)
        window, compiled_shapes, predicted, warned = Window(), set(), False, False
        logged_at, saved_at = start, time.monotonic()

        for number in range(start + 1, config.steps + 1):  # the step that this round finishes
            batch = next(feed)
            shapes = " ".join(f"{key}{list(array.shape)}" for key, array in sorted(batch.items()))
            compiles = shapes not in compiled_shapes
            if compiles:
                compiled_shapes.add(shapes)
                say(f"{name}: compiling for shapes {shapes}")
            state, measures = step(state, batch)
            window.add(measures, feed.waited, compiles)
            bar.update()
            if window.timed >= TIMED_STEPS_TO_PREDICT and not predicted:
                predicted, seconds = True, window.seconds / window.timed
                minutes = seconds * (config.steps - number) / 60
                say(f"{name}: about {minutes:.1f} minutes to go, {seconds:.3f} s a step")

            last = number == config.steps
            overdue = time.monotonic() - saved_at > config.checkpoint_minutes * 60
            stop, overdue = agreed(max(signals, default=0), overdue, ask=number % config.log_every == 0)
            # Not at every step: it is a transfer from the device. The next log line may be far off.
            looks = number % config.max_nonfinite == 0
            fails = looks and window.failures_in_a_row() >= config.max_nonfinite
            if last or stop or fails or number % config.log_every == 0:
                values, failures = window.take()
                log.write(number, values)
                losses = ", ".join(f"{key} {values[key]:.4g}" for key in (*sorted(task.weights), "total"))
                say(f"{name}: step {number}: {losses}")
                for sentence in describe_failures(failures, suspects, logged_at + 1, config.max_nonfinite):
                    say(f"{name}: {sentence}")
                share = values["data_wait_seconds"] / values["step_seconds"]
                if share > WAIT_WORTH_A_WARNING and not warned:
                    warned = True
                    say(f"{name}: warning: {share:.0%} of the step time is spent waiting for data")
                logged_at = number

            if validation and config.validate_every and (last or number % config.validate_every == 0):
                values = _validate(evaluate, task, state.params, validation, number, seed, mesh)
                log.write(number, values)
                total, patience = values["validation/total"], config.early_stopping_patience
                stopping = _next_stopping(stopping, total, patience)
                if best and not stopping["validations_since_best"]:
                    best.save(number, state, stopping)
                window.pause()

            ends = last or bool(stop) or stopping["stopped"]
            if ends or overdue or number % config.checkpoint_every == 0:
                checkpoints.save(number, state, stopping)
                saved_at = time.monotonic()
                window.pause()
            if stop:
                checkpoints.wait()
                say(f"{name}: stopped at step {number} of {config.steps}, saved in {directory}")
                say(f"{name}: run the same command again to go on")
                raise SystemExit(128 + stop)
            if stopping["stopped"]:
                say(f"{name}: stopped early at step {number}, best validation {stopping['best']:.4f}")
                break
        return _chosen(state, best, abstract)
