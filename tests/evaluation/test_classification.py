import numpy as np
import pytest

from opt_jax.evaluation import classification


def test_average_precision_by_hand():
    scores = np.array([[4.0], [3.0], [2.0], [1.0]])
    labels = np.array([[1], [0], [1], [0]])
    assert classification.average_precisions(scores, labels) == pytest.approx([(1 + 2 / 3) / 2])


def test_average_precision_agrees_with_scikit_learn_also_on_ties():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    for _ in range(200):
        samples, classes = rng.integers(2, 40), rng.integers(1, 5)
        scores = rng.integers(0, 8, size=(samples, classes)).astype(np.float32)
        labels = rng.random((samples, classes)) < 0.3
        labels[rng.integers(samples)] = True  # a positive in each class
        expected = [metrics.average_precision_score(labels[:, c], scores[:, c]) for c in range(classes)]
        np.testing.assert_allclose(classification.average_precisions(scores, labels), expected, atol=1e-12)
        found = classification.mean_average_precision(scores, labels)["mAP"]
        assert found == pytest.approx(100 * np.mean(expected), abs=1e-9)


def test_classes_without_positives_are_left_out_and_said():
    scores, labels = np.array([[2.0, 5.0], [1.0, 4.0]]), np.array([[1, 0], [0, 0]])
    assert classification.mean_average_precision(scores, labels) == {
        "mAP": 100.0,
        "classes": 1,
        "classes_left_out": 1,
    }
    with pytest.raises(ValueError, match="none of the 2 classes has a positive"):
        classification.mean_average_precision(scores, np.zeros((2, 2)))


def test_nan_ranks_last():
    scores, labels = np.array([[np.nan], [0.0], [-1.0]]), np.array([[1], [0], [0]])
    assert classification.average_precisions(scores, labels) == pytest.approx([1 / 3])


def test_chance_is_the_mean_frequency():
    labels = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 0, 0]])
    assert classification.chance_mean_average_precision(labels) == pytest.approx(100 * (0.5 + 0.25) / 2)


def test_linear_probe_agrees_with_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(1)
    features = rng.normal(size=(80, 6)) * [1, 10, 0.1, 1, 1, 1] + 3.0
    features[:, 5] = 2.0  # a constant feature must not divide by zero
    logits = features @ rng.normal(size=(6, 3)) + rng.normal(size=(80, 3))
    labels = (logits > np.median(logits, axis=0)).astype(np.float32)
    scores = classification.linear_probe(features[:60], labels[:60], features[60:], weight_decay=0.02)
    mean, deviation = features[:60].mean(0), features[:60].std(0)
    deviation[5] = 1.0
    for c in range(3):
        model = linear_model.LogisticRegression(C=1 / (0.02 * 60), tol=1e-8, max_iter=1000)
        model.fit((features[:60] - mean) / deviation, labels[:60, c])
        expected = model.decision_function((features[60:] - mean) / deviation)
        np.testing.assert_allclose(scores[:, c], expected, atol=2e-3)


@pytest.mark.parametrize(
    ("train", "labels", "test", "message"),
    [
        (np.zeros((0, 2)), np.zeros((0, 1)), np.zeros((1, 2)), "n > 0"),
        (np.zeros((2, 2)), np.zeros((3, 1)), np.zeros((1, 2)), "n > 0"),
        (np.zeros((2, 2)), np.zeros((2, 1)), np.zeros((1, 3)), "do not fit"),
        (np.array([[0.0], [np.nan]]), np.zeros((2, 1)), np.zeros((1, 1)), "row 1 of the training features"),
    ],
)
def test_linear_probe_names_bad_input(train, labels, test, message):
    with pytest.raises(ValueError, match=message):
        classification.linear_probe(train, labels, test)
