"""Donors of the replaced modalities, the loss of five sigmoids, and ranking scores."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opt_jax.objectives.matching import (
    draw_donors,
    image_for_text_audio_score,
    matching_loss,
    pair_score,
)

B = 12
KEYS = np.array([0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7])  # the first four captions occur twice
CLEAN = np.ones((B, 3), bool)
CLEAN[8] = False
CLEAN[9, 1] = False


@functools.partial(jax.jit, static_argnames="hard")
def draw(key, replaced, clean=CLEAN, captions=KEYS, similarity=None, hard=0.0):
    rows = replaced.shape[0]  # the sample-level rows are the first ones of the batch
    captions = jnp.asarray(captions)
    return draw_donors(key, jnp.asarray(replaced), clean, (captions[:rows], captions), similarity, hard)


@pytest.mark.parametrize("replaced", [(1, 0, 0), (0, 1, 0), (1, 1, 0), (1, 0, 1), (0, 1, 1)])
def test_donors_are_clean_others_with_other_captions(replaced):
    replaced = np.array([replaced] * 6, bool)
    draws = jax.vmap(lambda key: draw(key, replaced))(jax.random.split(jax.random.key(0), 300))
    donors, found = jax.device_get(draws)
    assert found.all()
    used = donors[..., replaced[0]]  # [300, 6, one or two]
    assert (KEYS[used] != KEYS[:6][None, :, None]).all()  # neither itself nor one that says the same
    for position, m in enumerate(np.flatnonzero(replaced[0])):
        assert CLEAN[used[..., position], m].all()
        others = [b for b in range(B) if CLEAN[b, m] and KEYS[b] != KEYS[0]]
        assert set(used[:, 0, position].tolist()) == set(others)
    if used.shape[-1] == 2:
        assert (KEYS[used[..., 0]] != KEYS[used[..., 1]]).all()


def test_without_a_donor_the_row_says_so():
    replaced = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0]], bool)
    captions = np.array([0, 1, 0, 0])
    _, found = draw(jax.random.key(0), replaced, np.ones((4, 3), bool), captions)
    # Row 2 would need two donors that say different things; there is only row 1.
    assert found.tolist() == [True, True, False, True]
    clean = np.array([[1, 1, 1], [0, 1, 1], [1, 1, 1], [1, 1, 1]], bool)
    _, found = draw(jax.random.key(0), replaced, clean, captions)
    assert found.tolist() == [False, True, False, True]
    _, found = draw(jax.random.key(0), replaced, np.ones((4, 3), bool), np.zeros(4, int))
    assert found.tolist() == [False, False, False, True]


def test_hard_donors_follow_the_similarity():
    replaced = np.array([[1, 0, 0]] * 4, bool)
    similarity = np.zeros((4, 3, B), np.float32)
    similarity[:, 0, 10] = 50
    similarity[:, 0, :4] = 100  # themselves and each other: row 0 may still not take row 0
    donors, _ = draw(jax.random.key(3), replaced, similarity=jnp.asarray(similarity), hard=1.0)
    assert all(donor != row and donor < 4 for row, donor in enumerate(donors[:, 0].tolist()))
    even, _ = draw(jax.random.key(3), replaced, similarity=jnp.asarray(similarity), hard=0.0)
    plain, _ = draw(jax.random.key(3), replaced)
    np.testing.assert_array_equal(even, plain)


def test_loss_by_hand():
    logits = np.array([[1.0, -1, 2, 0, 0.5], [3, 3, 3, 3, 3], [0, 0, 0, 2, -1], [9, 9, 9, 9, 9]], np.float32)
    label = np.array([2, 0, 3, 1])
    defined = np.array([[1] * 5, [1] * 5, [0, 0, 0, 1, 1], [0] * 5], bool)
    found = np.array([True, False, True, True])
    total, count = matching_loss(logits, label, defined, found)
    sigmoid = 1 / (1 + np.exp(-logits.astype(float)))
    first = -(np.log(sigmoid[0, 2]) + np.log(1 - sigmoid[0, [0, 1, 3, 4]]).sum()) / 5
    third = -(np.log(sigmoid[2, 3]) + np.log(1 - sigmoid[2, 4])) / 2
    np.testing.assert_allclose(total, first + third, rtol=1e-5)
    assert count == 3  # does not depend on who was found, which depends on the parameters


def test_scores_for_ranking():
    logits = jnp.array([[10.0, 20, 30, 40, 5]])
    assert pair_score(logits, ("text", "image")) == 35
    assert pair_score(logits, ("text", "audio")) == 25
    assert pair_score(logits, ("image", "audio")) == 15
    assert image_for_text_audio_score(logits) == -20
