"""AdamW (Loshchilov and Hutter, arXiv 1711.05101) with warmup, decay and a clipped gradient norm.

The learning rate is not part of the optax state: it is a function of the step, so that the rate which is
logged is the rate which was applied, and the state is the moments alone.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from opt_jax.partitioning import logical_axes, path_name, unbox

# The last word of a parameter's own name ("query_bias", "logit_scale") keeps it from decaying.
UNDECAYED = frozenset({"bias", "scale", "temperature"})


def learning_rate_schedule(config: ml_collections.ConfigDict) -> Callable[[Any], jax.Array]:
    """step -> learning rate (f32): linear from 0 over `warmup_steps`, then `decay` to the end of `steps`.

    The first step (0) already moves: its rate is peak / (warmup_steps + 1).
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    floor = peak * config.end_learning_rate_fraction
    span = max(config.steps - warmup, 1)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, floor, span),
        "cosine": optax.cosine_decay_schedule(peak, span, alpha=config.end_learning_rate_fraction),
    }
    if config.decay not in after:
        raise ValueError(f"decay {config.decay!r}: expected one of {sorted(after)}")

    def schedule(step):
        rising = peak * (step + 1) / (warmup + 1)
        return jnp.where(step < warmup, rising, after[config.decay](step - warmup)).astype(jnp.float32)

    return schedule


def weight_decay_mask(params_boxed: Any) -> Any:
    """True for the parameters that decay: matrices and larger, by name and by rank.

    Norm scales and biases never decay (BERT and UNITER do the same). Stacking layers gives their vectors a
    leading axis, so that rank alone would take them for matrices: the logical axis "layers" does not count,
    and the name rules out biases and scales whether or not axes are named.
    """
    axes = logical_axes(params_boxed)

    def decays(path, leaf):
        name = path_name(path)
        rank = leaf.ndim - axes[name].count("layers")
        return rank >= 2 and name.split("/")[-1].split("_")[-1] not in UNDECAYED

    return jax.tree_util.tree_map_with_path(decays, unbox(params_boxed))


def make_optimizer(config: ml_collections.ConfigDict, mask: Any) -> optax.GradientTransformation:
    """Gradients to directions of descent, to be multiplied by minus the learning rate."""
    return optax.chain(
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=mask),
    )


def square_sum(array: jax.Array) -> jax.Array:
    """The sum of squares, computed in float32."""
    return jnp.sum(jnp.square(array.astype(jnp.float32)))


def global_norm(tree: Any) -> jax.Array:
    """The L2 norm over all leaves, computed in float32."""
    return jnp.sqrt(sum(square_sum(leaf) for leaf in jax.tree.leaves(tree)))


def clip(gradients: Any, norm: jax.Array, limit: float) -> Any:
    """Gradients scaled so that their norm is at most `limit`; 0 means no limit."""
    if not limit:
        return gradients
    factor = limit / jnp.maximum(norm, limit)
    return jax.tree.map(lambda gradient: gradient * factor.astype(gradient.dtype), gradients)
