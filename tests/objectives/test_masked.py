"""Losses on masked positions against numpy formulas."""

import jax.numpy as jnp
import numpy as np
import pytest

from opt_jax.objectives.masked import accuracy, cross_entropy, squared_error

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(2, 3, 5)).astype(np.float32)
LABELS = np.array([[0, 4, 2], [1, 1, 3]])
WEIGHT = np.array([[True, False, True], [False, True, False]])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_the_one_with_smoothed_targets(smoothing):
    probabilities = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
    target = (1 - smoothing) * np.eye(5)[LABELS] + smoothing / 5
    each = -(target * np.log(probabilities)).sum(-1)
    total, count = cross_entropy(LOGITS, LABELS, WEIGHT, smoothing)
    np.testing.assert_allclose(total, each[WEIGHT].sum(), rtol=1e-5)
    assert count == 3 and total.dtype == jnp.float32 and count.dtype == jnp.float32


def test_cross_entropy_survives_large_logits():
    total, _ = cross_entropy(jnp.array([[1e4, -1e4]]), jnp.array([1]), jnp.array([True]))
    np.testing.assert_allclose(total, 2e4)


def test_squared_error_is_averaged_over_dimensions():
    targets = np.zeros((1, 2, 4), np.float16)
    predictions = np.array([[[1, 2, 3, 4], [9, 9, 9, 9]]], np.float32)
    total, count = squared_error(predictions, targets, np.array([[True, False]]))
    assert (float(total), float(count)) == ((1 + 4 + 9 + 16) / 4, 1)


def test_without_a_position_sum_and_count_are_zero():
    nowhere = np.zeros_like(WEIGHT)
    for total, count in (
        cross_entropy(LOGITS, LABELS, nowhere, 0.1),
        squared_error(LOGITS, LOGITS + 1, nowhere),
        accuracy(LOGITS, LABELS, nowhere),
    ):
        assert float(total) == float(count) == 0


def test_accuracy_counts_the_best_class():
    logits = np.array([[[2, 1, 0], [0, 3, 0], [0, 0, 1]]])
    right, count = accuracy(logits, np.array([[0, 1, 1]]), np.array([[True, False, True]]))
    assert (float(right), float(count)) == (1, 2)
