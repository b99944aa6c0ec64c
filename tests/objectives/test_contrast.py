"""The two contrasts: masked frames within a clip, modalities across samples."""

import jax
import jax.numpy as jnp
import numpy as np

from opt_jax.objectives.contrast import alignment_contrast, masked_frame_contrast

RNG = np.random.default_rng(0)
TARGETS = RNG.normal(size=(3, 4, 6)).astype(np.float32)
VALID = np.array([[True] * 4, [True, True, True, False], [True, False, False, False]])
MASKED = np.array([[True, False, True, False], [False, True, False, True], [True, False, False, False]])


def cosine(a, b):
    return a @ b.T / np.linalg.norm(a, axis=-1)[:, None] / np.linalg.norm(b, axis=-1)


def test_frame_contrast_is_the_papers_formula():
    predictions = RNG.normal(size=TARGETS.shape).astype(np.float32)
    similarity = np.exp(cosine(predictions[0], TARGETS[0]) / 0.5)
    expected = sum(-np.log(similarity[i, i] / similarity[i].sum()) for i in (0, 2))
    similarity = np.exp(cosine(predictions[1, :3], TARGETS[1, :3]) / 0.5)
    expected += -np.log(similarity[1, 1] / similarity[1].sum())
    # The second clip's masked padding and the third clip, which has no negative, add nothing.
    total, count = masked_frame_contrast(predictions, TARGETS, MASKED, VALID, 0.5)
    np.testing.assert_allclose(total, expected, rtol=1e-4)
    assert count == 3


def test_aligned_frames_lose_less_than_anti_aligned_ones():
    aligned, _ = masked_frame_contrast(TARGETS, TARGETS, MASKED, VALID, 0.1)
    opposite, _ = masked_frame_contrast(-TARGETS, TARGETS, MASKED, VALID, 0.1)
    unrelated, _ = masked_frame_contrast(TARGETS[..., ::-1], TARGETS, MASKED, VALID, 0.1)
    assert aligned < unrelated < opposite


def test_negatives_never_cross_clips():
    def loss_of_first(targets):
        masked = MASKED & (np.arange(3) == 0)[:, None]
        return masked_frame_contrast(TARGETS + 0.1, targets, masked, VALID, 0.1)[0]

    gradient = jax.grad(loss_of_first)(jnp.asarray(TARGETS))
    assert np.abs(gradient[0]).max() > 1e-3 and not gradient[1:].any()


def test_only_masked_positions_and_valid_negatives_count():
    def loss(predictions, targets):
        return masked_frame_contrast(predictions, targets, MASKED, VALID, 0.1)[0]

    predictions, targets = jax.grad(loss, argnums=(0, 1))(jnp.asarray(TARGETS + 0.1), jnp.asarray(TARGETS))
    used = MASKED & VALID & (VALID.sum(1, keepdims=True) > 1)
    np.testing.assert_array_equal(np.abs(predictions).max(-1) > 0, used)
    assert not targets[~VALID].any() and (np.abs(targets[:2]).max(-1) > 0)[VALID[:2]].all()


def test_silent_frames_give_no_nan():
    gradient = jax.grad(lambda x: masked_frame_contrast(x, TARGETS * 0, MASKED, VALID, 0.1)[0])(TARGETS * 0)
    assert np.isfinite(gradient).all()


def unit(*shape):
    x = RNG.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def test_alignment_of_two_samples_by_hand():
    text, image = np.array([[1.0, 0], [0, 1]]), np.array([[0.8, 0.6], [0.6, -0.8]])
    audio = np.zeros((2, 2))
    available = np.array([[True, True, False]] * 2)
    total, count = alignment_contrast([text, image, audio], available, np.array([1, 2]), 0.5)
    e = np.exp(np.array([[0.8, 0.6], [0.6, -0.8]]) / 0.5)  # text by image
    each = [e[0, 0] / e[0].sum(), e[1, 1] / e[1].sum(), e[0, 0] / e[:, 0].sum(), e[1, 1] / e[:, 1].sum()]
    np.testing.assert_allclose(total, -np.log(each).sum(), rtol=1e-5)
    assert count == 4


def test_equal_captions_are_correct_for_each_other():
    z = [unit(3, 4) for _ in range(3)]
    available = np.array([[True, False, True]] * 3)
    total, count = alignment_contrast(z, available, np.array([7, 8, 7]), 0.3)
    expected = 0.0
    for e in (np.exp(z[0] @ z[2].T / 0.3), np.exp(z[2] @ z[0].T / 0.3)):
        expected -= np.log((e[0, 0] + e[0, 2]) / e[0].sum())
        expected -= np.log((e[2, 0] + e[2, 2]) / e[2].sum())
        expected -= np.log(e[1, 1] / e[1].sum())
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert count == 6
    same, _ = alignment_contrast(z, available, np.array([7, 7, 7]), 0.3)
    np.testing.assert_allclose(same, 0, atol=1e-5)


def test_all_three_pairs_of_modalities_count_in_both_directions():
    z = [unit(4, 5) for _ in range(3)]
    key = np.arange(4)
    everything, count = alignment_contrast(z, np.ones((4, 3), bool), key, 0.2)
    assert count == 3 * 2 * 4
    parts = 0.0
    for pair in ([1, 1, 0], [1, 0, 1], [0, 1, 1]):
        part, number = alignment_contrast(z, np.array([pair] * 4, bool), key, 0.2)
        parts, _ = parts + part, number
        assert number == 8
    np.testing.assert_allclose(everything, parts, rtol=1e-5)


def test_what_is_not_available_has_no_influence():
    z = [unit(4, 5) for _ in range(3)]
    available = np.array([[1, 1, 1], [1, 0, 1], [0, 1, 0], [0, 1, 1]], bool)
    gradients = jax.grad(lambda z: alignment_contrast(z, available, jnp.arange(4), 0.2)[0])(z)
    for m in range(3):
        moved = np.abs(gradients[m]).max(-1) > 0
        assert not moved[~available[:, m]].any() and moved[available[:, m]].sum() >= 2
    alone, count = alignment_contrast(z, np.eye(4, 3, dtype=bool), jnp.arange(4), 0.2)
    assert float(alone) == float(count) == 0
