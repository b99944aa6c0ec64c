"""The train state: everything that decides the rest of a run, except the data and the seed."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh

from opt_jax.partitioning import parameter_shardings, path_name, replicated, unbox

INITIAL_LOSS_SCALE = 2.0**15
SMALLEST_LOSS_SCALE = 1.0
LARGEST_LOSS_SCALE = 2.0**24
GOOD_STEPS_TO_DOUBLE = 2000


class InitialParametersError(ValueError):
    """Parameters to start from are not those of the model."""


@struct.dataclass
class State:
    """step counts finished steps, skipped ones too. All counters are int32 scalars, loss_scale is float32."""

    step: jax.Array
    params: Any
    optimizer: Any
    loss_scale: jax.Array
    good_steps: jax.Array  # since the loss scale last changed
    skipped: jax.Array  # non-finite steps of the whole run
    consecutive: jax.Array  # non-finite steps up to now, without a good one between them


def fresh(params: Any, optimizer: optax.GradientTransformation, precision: str) -> State:
    """The state before the first step. Only float16 scales its loss; elsewhere the scale stays 1."""
    if precision not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"precision {precision!r}: expected 'float32', 'bfloat16' or 'float16'")
    scale = INITIAL_LOSS_SCALE if precision == "float16" else SMALLEST_LOSS_SCALE
    return State(
        params=params,
        optimizer=optimizer.init(params),
        loss_scale=jnp.float32(scale),
        **{name: jnp.int32(0) for name in ("step", "good_steps", "skipped", "consecutive")},
    )


def shardings(
    mesh: Mesh, params_boxed: Any, optimizer: optax.GradientTransformation, precision: str
) -> State:
    """A State of NamedShardings: moments live where their parameters live, scalars everywhere."""
    of_params = parameter_shardings(mesh, params_boxed)
    abstract = jax.eval_shape(lambda params: fresh(params, optimizer, precision), unbox(params_boxed))
    moments = optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        abstract.optimizer,
        of_params,
        transform_non_params=lambda _: replicated(mesh),
    )
    everywhere = jax.tree.map(lambda _: replicated(mesh), abstract.replace(params=None, optimizer=None))
    return everywhere.replace(params=of_params, optimizer=moments)


def with_initial(params: Any, initial: Mapping[str, Any], name: str) -> Any:
    """`params` with every leaf that `initial` has under the same path taken from there.

    Prints a table of what is given and what stays fresh. Raises InitialParametersError when a shape differs,
    naming the path, or when nothing matches at all. Dtypes and shardings stay those of `params`.
    """
    given = {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(initial)[0]}
    fresh_paths, groups = [], {}

    def choose(path, leaf):
        path = path_name(path)
        group = groups.setdefault(path.rpartition("/")[0], {"given": 0, "fresh": 0})
        group["fresh" if path not in given else "given"] += 1
        if path not in given:
            fresh_paths.append(path)
            return leaf
        found = np.asarray(given.pop(path))
        if found.shape != leaf.shape:
            raise InitialParametersError(
                f"{name}: {path} is {leaf.shape} in the model, {found.shape} in initial_params; give the"
                " model that size, or choose others to start from"
            )
        return jax.device_put(found.astype(leaf.dtype), leaf.sharding)

    total, offered = len(jax.tree.leaves(params)), len(given)
    merged = jax.tree_util.tree_map_with_path(choose, params)
    if len(fresh_paths) == total:
        raise InitialParametersError(
            f"{name}: no initial parameter matches; given {sorted(given)[:3]}, wanted {fresh_paths[:3]};"
            " choose others to start from"
        )
    print(f"{name}: {total - len(fresh_paths)} of {total} parameters start from the {offered} given")
    for path, counts in groups.items():
        parts = (f"{number} {kind}" for kind, number in counts.items() if number)
        print(f"{name}:   {path:50} {', '.join(parts)}")
    if given:
        print(f"{name}: given, but not in the model: {', '.join(sorted(given))}")
    return merged


def next_loss_scale(state: State, finite: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(loss_scale, good_steps) after a step: halved on overflow, doubled after 2,000 good steps in a row."""
    good = jnp.where(finite, state.good_steps + 1, 0)
    double = good >= GOOD_STEPS_TO_DOUBLE
    scale = jnp.where(finite, jnp.where(double, state.loss_scale * 2, state.loss_scale), state.loss_scale / 2)
    scale = jnp.clip(scale, SMALLEST_LOSS_SCALE, LARGEST_LOSS_SCALE)
    return scale, jnp.where(double, 0, good)


def advance(
    state: State, finite: jax.Array, update: Callable[[], tuple[Any, Any]], scales_loss: bool
) -> State:
    """The state after a step whose losses and gradients were all `finite` (bool scalar) or not.

    Without a finite step, parameters and optimizer state keep their bits. An overflow above the smallest loss
    scale is float16's way of finding its scale, and counts neither as skipped nor as consecutive.
    """
    # A branch, which updates in place. Choosing between finished values would need the whole state twice.
    params, optimizer = jax.lax.cond(finite, update, lambda: (state.params, state.optimizer))
    failed = ~finite & (state.loss_scale <= SMALLEST_LOSS_SCALE)
    scale, good = next_loss_scale(state, finite) if scales_loss else (state.loss_scale, state.good_steps)
    return State(
        step=state.step + 1,
        params=params,
        optimizer=optimizer,
        loss_scale=scale,
        good_steps=good,
        skipped=state.skipped + failed,
        consecutive=jnp.where(finite, 0, state.consecutive + failed),
    )
