"""Hard negatives, and the samples that are put together from them."""

import types

import jax
import jax.numpy as jnp
import numpy as np

from opt_jax.tasks.retrieval import Retrieval, shown_lengths


def negatives(similarity, usable, hard_fraction, seed=0, number=1):
    settings = dict(hard_fraction=hard_fraction, hard_temperature=0.01, negatives=number)
    task = types.SimpleNamespace(config=types.SimpleNamespace(**settings))
    return np.asarray(Retrieval.negatives(task, jax.random.key(seed), jnp.asarray(similarity), usable))


def test_negatives_are_allowed_rows_and_hard_ones_the_likest():
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 5, 16)
    usable = keys[:12, None] != keys[None]
    similarity = rng.normal(size=(12, 16))
    for seed in range(20):
        for fraction in (0.0, 0.5, 1.0):
            found = negatives(similarity, usable, fraction, seed, number=3)
            assert np.take_along_axis(usable, found, 1).all()
            assert all(len(set(row)) == 3 for row in found)
    hard = negatives(similarity * 10, usable, 1.0, number=2)
    np.testing.assert_array_equal(hard, np.argsort(-np.where(usable, similarity, -np.inf), 1)[:, :2])
    even = np.stack([negatives(similarity * 10, usable, 0.0, seed) for seed in range(50)])
    assert len(np.unique(even[:, 0])) > 5


def test_parts_come_from_their_rows_and_others_are_not_seen():
    lengths, size = (3, 2, 4), 5
    position = jnp.arange(9)
    states = 100 * jnp.arange(size)[:, None, None] + position[None, :, None].astype(jnp.float32)
    valid = jnp.ones((size, 9), bool).at[2, 1].set(False)  # row 2 has a text of one piece less
    texts, images = jnp.array([2, 2, 0, 1, 4]), jnp.array([3, 0, 0, 4, 1])
    made, seen = Retrieval.composed(states, valid, lengths, {"text": texts, "image": images})
    assert made.shape[1] == sum(shown_lengths(lengths, ("text", "image"))) == 5
    np.testing.assert_array_equal(made[:, 0, 0], 100 * texts)
    np.testing.assert_array_equal(made[:, 1:3, 0], 100 * texts[:, None] + jnp.array([1, 2]))
    np.testing.assert_array_equal(made[:, 3:, 0], 100 * images[:, None] + jnp.array([3, 4]))
    assert seen[:, 0].all() and seen[:, 2:].all()
    np.testing.assert_array_equal(seen[:, 1], np.asarray(texts) != 2)
    made, seen = Retrieval.composed(states, valid, lengths, {"audio": images[:3]})
    assert shown_lengths(lengths, ("audio",)) == (1, 0, 4)
    np.testing.assert_array_equal(made[:, 1:, 0], 100 * images[:3, None] + jnp.arange(5, 9))
