"""Multi-label classification on frozen features: mean average precision and a linear probe.

OPT, arXiv 2107.00249, table 2. Letters: n samples, d features, C classes.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax


def average_precisions(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Average precision [C] in [0, 1] of each class; NaN for a class without a positive sample.

    scores: [n, C] float, NaN ranks last; labels: [n, C] in {0, 1}. The mean over positives of the precision
    at their score, equal scores taken together (the step-wise sum, without interpolation).
    """
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels)
    if scores.ndim != 2 or scores.size == 0 or scores.shape != labels.shape:
        raise ValueError(
            f"average precision needs scores and labels of one shape [samples, classes] with no empty axis, "
            f"found {scores.shape} and {labels.shape}"
        )
    scores = np.where(np.isnan(scores), -np.inf, scores)
    result = np.full(scores.shape[1], np.nan)
    for c in range(scores.shape[1]):
        order = np.argsort(-scores[:, c], kind="stable")
        ordered, positive = scores[order, c], labels[order, c] > 0
        if not positive.any():
            continue
        last_equal = np.searchsorted(-ordered, -ordered, side="right") - 1  # end of the equal scores
        precision = (np.cumsum(positive) / np.arange(1, len(ordered) + 1))[last_equal]
        result[c] = precision[positive].mean()
    return result


def mean_average_precision(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """{"mAP": percent, "classes": counted, "classes_left_out": without a positive}. Shapes as above."""
    precisions = average_precisions(scores, labels)
    counted = ~np.isnan(precisions)
    if not counted.any():
        raise ValueError(f"none of the {len(precisions)} classes has a positive sample among {len(labels)}")
    return {
        "mAP": 100.0 * float(precisions[counted].mean()),
        "classes": int(counted.sum()),
        "classes_left_out": int((~counted).sum()),
    }


def chance_mean_average_precision(labels: np.ndarray) -> float:
    """mAP in percent of one score for all: mean frequency of the classes that occur. labels: [n, C]."""
    return mean_average_precision(np.zeros(np.shape(labels)), labels)["mAP"]


def linear_probe(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    *,
    weight_decay: float = 1e-3,
    steps: int = 100,
) -> np.ndarray:
    """Logits float32 [m, C] of test samples, by one logistic regression per class on frozen features.

    train_features: [n, d]; train_labels: [n, C] in {0, 1}; test_features: [m, d]. Features are standardised
    by the training set. The mean loss plus weight_decay / 2 times the squared weights (not biases) is
    minimised by `steps` iterations of L-BFGS over the whole set: the problem is convex, the result
    deterministic.
    """
    train_features, test_features = (
        np.asarray(train_features, np.float32),
        np.asarray(test_features, np.float32),
    )
    train_labels = np.asarray(train_labels, np.float32)
    if train_features.ndim != 2 or len(train_features) == 0 or len(train_features) != len(train_labels):
        raise ValueError(
            f"linear probe needs features [n, d] and labels [n, C] of n > 0 samples, "
            f"found {train_features.shape} and {train_labels.shape}"
        )
    if test_features.shape[1:] != train_features.shape[1:]:
        raise ValueError(
            f"test features {test_features.shape} do not fit training features {train_features.shape}"
        )
    for name, features in (("training", train_features), ("test", test_features)):
        if not np.isfinite(features).all():
            row = int(np.argmin(np.isfinite(features).all(axis=1)))
            raise ValueError(f"row {row} of the {name} features is not finite")
    mean, deviation = train_features.mean(axis=0), train_features.std(axis=0)
    deviation = np.where(deviation > 1e-6, deviation, 1.0)
    params = _fit((train_features - mean) / deviation, train_labels, weight_decay, steps)
    return np.asarray((test_features - mean) / deviation @ params["weights"] + params["biases"])


@partial(jax.jit, static_argnames="steps")
def _fit(features: jax.Array, labels: jax.Array, weight_decay: float, steps: int) -> dict[str, jax.Array]:
    def loss(params):
        logits = features @ params["weights"] + params["biases"]
        likelihood = optax.sigmoid_binary_cross_entropy(logits, labels).mean(axis=0).sum()
        return likelihood + 0.5 * weight_decay * jnp.sum(params["weights"] ** 2)

    optimizer = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(_, carry):
        params, state = carry
        value, grads = value_and_grad(params, state=state)
        updates, state = optimizer.update(grads, state, params, value=value, grad=grads, value_fn=loss)
        return optax.apply_updates(params, updates), state

    classes = labels.shape[1]
    params = {"weights": jnp.zeros((features.shape[1], classes)), "biases": jnp.zeros(classes)}
    return jax.lax.fori_loop(0, steps, step, (params, optimizer.init(params)))[0]
