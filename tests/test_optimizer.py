"""Learning rates, decay masks and clipping, against values worked out by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from opt_jax.optimizer import clip, global_norm, learning_rate_schedule, make_optimizer, weight_decay_mask
from opt_jax.state import LARGEST_LOSS_SCALE, advance, fresh


def settings(**fields):
    defaults = dict(learning_rate=0.8, warmup_steps=3, steps=11, end_learning_rate_fraction=0.25)
    return ConfigDict(defaults | {"decay": "linear"} | fields)


@pytest.mark.parametrize(
    ("decay", "wanted"),
    [("linear", [0.2, 0.4, 0.6, 0.8, 0.5, 0.2]), ("constant", [0.2, 0.4, 0.6, 0.8, 0.8, 0.8])],
)
def test_the_rate_rises_and_falls(decay, wanted):
    schedule = learning_rate_schedule(settings(decay=decay))
    np.testing.assert_allclose([schedule(step) for step in (0, 1, 2, 3, 7, 11)], wanted, rtol=1e-6)


def test_cosine_is_halfway_in_the_middle():
    schedule = learning_rate_schedule(settings(decay="cosine"))
    np.testing.assert_allclose([schedule(3), schedule(7), schedule(11)], [0.8, 0.5, 0.2], rtol=1e-6)


def test_an_unknown_decay_is_named():
    with pytest.raises(ValueError, match="'exponential'"):
        learning_rate_schedule(settings(decay="exponential"))


def test_norms_biases_and_vectors_do_not_decay():
    def stacked(*shape):
        return nn.LogicallyPartitioned(jnp.zeros((12, *shape)), ("layers", *[None] * len(shape)))

    mask = weight_decay_mask(
        {
            "word": {"embedding": jnp.zeros((9, 4))},
            "norm": {"scale": jnp.zeros(4), "bias": jnp.zeros(4)},
            "layers": {
                "norm": {"scale": jnp.zeros((12, 4)), "bias": jnp.zeros((12, 4))},  # stacked, axes not named
                "attention": {"kernel": stacked(4, 4), "query_bias": stacked(2, 2), "gate": stacked(4)},
            },
            "logit_scale": jnp.zeros((1, 1)),
            "mask": jnp.zeros(4),
        }
    )
    assert mask == {
        "word": {"embedding": True},
        "norm": {"scale": False, "bias": False},
        "layers": {
            "norm": {"scale": False, "bias": False},
            "attention": {"kernel": True, "query_bias": False, "gate": False},
        },
        "logit_scale": False,
        "mask": False,
    }


def test_it_is_adamw():
    config = ConfigDict(dict(beta1=0.9, beta2=0.98, epsilon=1e-6, weight_decay=0.1))
    params = {"kernel": jnp.full((2, 2), 2.0), "bias": jnp.ones(2)}
    mask = weight_decay_mask(params)
    ours = make_optimizer(config, mask)
    reference = optax.adamw(0.5, b1=0.9, b2=0.98, eps=1e-6, weight_decay=0.1, mask=mask)
    states = ours.init(params), reference.init(params)
    for scale in (1.0, -3.0):
        gradients = jax.tree.map(lambda leaf, scale=scale: scale * leaf, params)
        mine, _ = ours.update(gradients, states[0], params)
        theirs, _ = reference.update(gradients, states[1], params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(-0.5 * a, b, rtol=1e-6), mine, theirs)


def test_clipping_keeps_the_direction():
    gradients = {"a": jnp.array([3.0]), "b": jnp.array([[4.0]])}
    norm = global_norm(gradients)
    assert norm == 5.0
    np.testing.assert_allclose(clip(gradients, norm, 1.0)["b"], [[0.8]])
    np.testing.assert_array_equal(clip(gradients, norm, 6.0)["b"], [[4.0]])
    assert clip(gradients, norm, 0.0) is gradients


def test_the_norm_of_half_precision_does_not_overflow():
    assert global_norm({"a": jnp.full(4, 300.0, jnp.float16)}) == 600.0  # 300 squared exceeds float16


def test_the_loss_scale_doubles_after_2000_good_steps_and_counts_only_at_one():
    optimizer = optax.identity()
    state = fresh({"w": jnp.ones(2)}, optimizer, "float16")

    def after(state, finite):
        update = lambda: ({"w": state.params["w"] + 1}, state.optimizer)  # noqa: E731
        return advance(state, jnp.bool_(finite), update, scales_loss=True)

    state = after(state.replace(good_steps=jnp.int32(1999)), True)
    assert (state.loss_scale, state.good_steps) == (2.0**16, 0)
    state = after(state.replace(good_steps=jnp.int32(1998)), False)
    assert (state.loss_scale, state.good_steps, state.skipped) == (2.0**15, 0, 0)
    state = after(state.replace(loss_scale=jnp.float32(1.0)), False)
    assert (state.loss_scale, state.skipped, state.consecutive) == (1.0, 1, 1)
    np.testing.assert_array_equal(state.params["w"], [2.0, 2.0])
    state = after(state, True)
    assert (state.skipped, state.consecutive, state.step) == (1, 0, 4)
    high = state.replace(loss_scale=jnp.float32(LARGEST_LOSS_SCALE), good_steps=jnp.int32(1999))
    assert after(high, True).loss_scale == LARGEST_LOSS_SCALE
