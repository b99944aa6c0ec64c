"""One training step as a pure function of (state, batch): losses, gradients, update, measures."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from opt_jax.optimizer import clip, global_norm, learning_rate_schedule, square_sum
from opt_jax.partitioning import BATCH_AXES, path_name
from opt_jax.state import State, advance

Batch = Mapping[str, jax.Array]
Losses = dict[str, tuple[jax.Array, jax.Array]]
LossFunction = Callable[[Any, Batch, jax.Array, jax.Array], Losses]


@dataclass(frozen=True)
class Task:
    """What is trained. All four functions are pure and are traced under jit.

    init(key, batch) -> params: Linen parameters, leaves maybe boxed with logical axis names. The batch has
        the shapes of the real ones, before `prepare`, and zeros for values.
    losses(params, batch, key, step) -> {name: (sum, count)}: float32 scalars over the rows given. Counts do
        not depend on params. A sum must be a sum over rows, or accumulation would change it.
    weights: total = sum over its names of weight * sum / max(count, 1). What losses returns beyond these
        names is logged and gives no gradient.
    prepare(key, batch) -> batch: done once to the whole batch on the device, before accumulation splits it.
    evaluate_losses: as losses, for validation (no dropout); None: losses itself.
    rows_per_group: rows that belong together, in runs of so many from row 0; accumulation deals out whole
        groups.
    """

    init: Callable[[jax.Array, Batch], Any]
    losses: LossFunction
    weights: Mapping[str, float]
    prepare: Callable[[jax.Array, Batch], Batch] = lambda key, batch: batch
    evaluate_losses: LossFunction | None = None
    rows_per_group: int = 1


def total_loss(losses: Losses, counts: Mapping[str, jax.Array], weights: Mapping[str, float]) -> jax.Array:
    """sum_i w_i * sum_i / max(count_i, 1), float32; `counts` are those of the whole batch."""
    missing = sorted(set(weights) - set(losses))
    if missing:
        raise KeyError(f"weights name the losses {missing}, but the task returns only {sorted(losses)}")
    total = sum(w * losses[name][0] / jnp.maximum(counts[name], 1) for name, w in weights.items())
    return jnp.asarray(total, jnp.float32)


def microbatches(batch: Batch, number: int, group: int, mesh: Mesh) -> Batch:
    """[B, ...] -> [number, B/number, ...], by groups of rows: microbatch m is groups m::number.

    So a row changes device only where a device's groups are not a multiple of `number`. Raises ValueError
    naming the array whose rows do not make so many groups.
    """
    sharding = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))

    def split(path, array):
        rows, *rest = array.shape
        if rows % (number * group):
            raise ValueError(
                f"{path_name(path)}: {rows} rows do not make {number} microbatches of whole groups of {group}"
            )
        array = array.reshape(-1, number, group, *rest).swapaxes(0, 1).reshape(number, -1, *rest)
        return jax.lax.with_sharding_constraint(array, sharding)

    return jax.tree_util.tree_map_with_path(split, batch)


def _gradients(task, params, batch, key, step, scale, number, mesh):
    """(losses, total, gradients) of the whole batch in `number` parts.

    What is derived is total * scale, if there is one; without, no pass over the gradients undoes it.
    """

    def derived(params, batch, key, counts):
        losses = task.losses(params, batch, key, step)
        counts = {name: count for name, (_, count) in losses.items()} if counts is None else counts
        total = total_loss(losses, counts, task.weights)
        return total if scale is None else total * scale, (losses, total)

    derive = jax.grad(derived, has_aux=True)
    if number == 1:
        gradients, (losses, total) = derive(params, batch, jax.random.fold_in(key, 0), None)
    else:
        # Every part is divided by the counts of the whole batch. They depend on no parameter, so that XLA
        # drops the forward pass that this call seems to make.
        counts = {name: count for name, (_, count) in task.losses(params, batch, key, step).items()}

        def part(carry, numbered):
            m, rows = numbered
            result = derive(params, rows, jax.random.fold_in(key, m), counts)
            return jax.tree.map(jnp.add, carry, result), None

        parts = (jnp.arange(number), microbatches(batch, number, task.rows_per_group, mesh))
        like = jax.eval_shape(lambda: derive(params, jax.tree.map(lambda x: x[0], parts[1]), key, counts))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
        (gradients, (losses, total)), _ = jax.lax.scan(part, zeros, parts)
    gradients = jax.tree.map(lambda gradient: gradient.astype(jnp.float32), gradients)
    if scale is not None:
        gradients = jax.tree.map(lambda gradient: gradient / scale, gradients)
    return losses, total, gradients


def _suspects(sums: Mapping[str, jax.Array], total: jax.Array, gradients: Any) -> list[tuple[str, jax.Array]]:
    """(name, is it finite) of all that must be, in the order in which they are blamed.

    A gradient counts as finite if its sum of squares is, which the norm needs too.
    """
    by_path = jax.tree_util.tree_flatten_with_path(gradients)[0]
    return [
        *((f"the loss {name!r}", jnp.isfinite(sums[name])) for name in sorted(sums)),
        ("the total loss", jnp.isfinite(total)),
        *((f"the gradient of {path_name(path)}", jnp.isfinite(square_sum(leaf))) for path, leaf in by_path),
    ]


def suspect_names(weights: Mapping[str, float], params: Any) -> list[str]:
    """The names that the measure "nonfinite" indexes: losses with a weight, then gradients."""
    placeholder = jnp.zeros(())
    gradients = jax.tree.map(lambda _: placeholder, params)
    return [name for name, _ in _suspects(dict.fromkeys(weights, placeholder), placeholder, gradients)]


def count_tokens(batch: Batch) -> jax.Array:
    """Valid positions of all modalities in the batch (f32); its rows where it has no `*_valid` array."""
    valid = [array for name, array in batch.items() if name.endswith("_valid") and name != "row_valid"]
    if valid:
        return sum(jnp.sum(array, dtype=jnp.float32) for array in valid)
    return jnp.float32(next(iter(batch.values())).shape[0])


def make_step(
    task: Task,
    config: ml_collections.ConfigDict,
    optimizer: optax.GradientTransformation,
    seed: int,
    mesh: Mesh,
) -> Callable[[State, Batch], tuple[State, dict[str, Any]]]:
    """step(state, batch) -> (state, measures), to be jitted with the state donated.

    measures: losses {name: (sum, count)}, total, gradient_norm (before clipping), learning_rate, tokens,
    loss_scale, skipped, consecutive, and nonfinite: the index into `suspect_names` of the first thing that is
    not finite, -1 if all are. Random keys are functions of (seed, step) alone.
    """
    schedule = learning_rate_schedule(config)
    scales_loss = config.precision == "float16"

    def step(state, batch):
        prepare_key, losses_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))
        tokens = count_tokens(batch)
        batch = task.prepare(prepare_key, batch)
        scale = state.loss_scale if scales_loss else None
        losses, total, gradients = _gradients(
            task, state.params, batch, losses_key, state.step, scale, config.accumulation, mesh
        )
        norm = global_norm(gradients)
        rate = schedule(state.step)
        sums = {name: losses[name][0] for name in task.weights}
        failing = ~jnp.stack([finite for _, finite in _suspects(sums, total, gradients)])
        finite = ~jnp.any(failing)

        def update():
            directions, moments = optimizer.update(
                clip(gradients, norm, config.clip_norm), state.optimizer, state.params
            )
            return optax.apply_updates(state.params, jax.tree.map(lambda d: -rate * d, directions)), moments

        new = advance(state, finite, update, scales_loss)
        return new, {
            "losses": losses,
            "total": total,
            "gradient_norm": norm,
            "learning_rate": rate,
            "tokens": tokens,
            "loss_scale": state.loss_scale,
            "skipped": new.skipped,
            "consecutive": new.consecutive,
            "nonfinite": jnp.where(finite, -1, jnp.argmax(failing)),
        }

    return step


def make_evaluation(task: Task) -> Callable[[Any, Batch, jax.Array, jax.Array], Losses]:
    """evaluate(params, batch, key, step) -> {name: (sum, count)}, without gradients."""
    losses = task.evaluate_losses or task.losses

    def evaluate(params, batch, key, step):
        prepare_key, losses_key = jax.random.split(key)
        return losses(params, task.prepare(prepare_key, batch), losses_key, step)

    return evaluate
