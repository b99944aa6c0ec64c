import numpy as np
import pytest

from opt_jax.evaluation import retrieval


def test_recall_by_hand():
    scores = np.array([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    correct = np.eye(3, dtype=bool)[[0, 1, 2, 2]]
    assert retrieval.ranks(scores, correct).tolist() == [0, 1, 2, 0]
    assert retrieval.recall_at_k(scores, correct, (1, 2, 3)) == {"R@1": 50.0, "R@2": 75.0, "R@3": 100.0}


def test_constant_scores_find_nothing():
    scores = np.zeros((4, 4))
    assert retrieval.recall_at_k(scores, np.eye(4, dtype=bool), (1, 3, 4)) == {"R@1": 0, "R@3": 0, "R@4": 100}


def test_recall_agrees_with_sorting_and_the_worst_order_of_ties():
    rng = np.random.default_rng(0)
    for _ in range(200):
        queries, items = rng.integers(1, 8, size=2)
        scores = rng.integers(0, 5, size=(queries, items)).astype(np.float64)
        correct = rng.random((queries, items)) < 0.4
        correct[np.arange(queries), rng.integers(0, items, size=queries)] = True
        expected = {}
        for k in (1, 2, 5):
            found = 0
            for row, right in zip(scores, correct, strict=True):
                first = sorted(zip(-row, right, strict=True))[:k]  # of equal scores, the wrong items first
                found += any(right for _, right in first)
            expected[f"R@{k}"] = 100 * found / queries
        assert retrieval.recall_at_k(scores, correct, (1, 2, 5)) == pytest.approx(expected, abs=1e-9)


def test_nan_ranks_last_on_either_side():
    correct = np.eye(3, dtype=bool)[:2]
    scores = np.array([[np.nan, 0.0, -1e9], [np.nan, -1e9, -np.inf]])
    assert retrieval.ranks(scores, correct).tolist() == [2, 0]
    assert retrieval.ranks(np.full((2, 3), np.nan), correct).tolist() == [2, 2]


def test_equal_captions_are_correct_for_each_other():
    keys = np.array([7, 8, 7])
    correct = retrieval.equal_captions(keys, keys)
    assert correct.tolist() == [[True, False, True], [False, True, False], [True, False, True]]
    # Query 0 finds its twin first and is tied with it: neither counts against it.
    scores = np.array([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 2.0, 1.0]])
    assert retrieval.ranks(scores, correct).tolist() == [0, 0, 1]


def test_combine_puts_scorers_on_one_scale():
    first = np.array([[0.0, 1.0, 2.0]])
    second = np.array([[500.0, 0.0, 250.0]])
    deviation = np.sqrt(2 / 3)
    np.testing.assert_allclose(
        retrieval.combine([first, second], [2.0, 1.0]), [[-1 / deviation, -1 / deviation, 2 / deviation]]
    )


def test_combine_keeps_nan_out_of_statistics_and_off_scorers_out_of_the_sum():
    scores = np.array([[0.0, 2.0, np.nan]])
    np.testing.assert_allclose(retrieval.combine([scores], [1.0]), [[-1.0, 1.0, np.nan]])
    np.testing.assert_allclose(retrieval.combine([scores, np.eye(1, 3)], [0.0, 0.0]), [[0.0, 0.0, 0.0]])
    with pytest.raises(ValueError, match="differ in shape"):
        retrieval.combine([scores, np.zeros((1, 2))], [1.0, 1.0])


def test_debias_takes_out_the_mean_over_queries():
    log_likelihood = np.array([[-10.0, -2.0], [-14.0, -1.0], [-np.inf, np.nan]])
    np.testing.assert_allclose(
        retrieval.debias(log_likelihood), [[2.0, -0.5], [-2.0, 0.5], [-np.inf, np.nan]]
    )


def test_mutual_information_takes_out_how_likely_a_text_is_at_all():
    # Text 1 fits every picture, text 0 the first alone: of the two that are true of it, text 0 is its own.
    probabilities = np.array([[0.02, 0.1], [1e-9, 0.1], [0.0, 0.1]])
    with np.errstate(divide="ignore"):
        scores = retrieval.mutual_information(np.log(probabilities))
    np.testing.assert_allclose(scores[0], [np.log(3), 0.0], atol=1e-6)
    assert scores[2, 0] == -np.inf
    elsewhere = np.array([[np.log(0.04), np.log(0.1)], [-np.inf, np.log(0.3)]])
    scores = retrieval.mutual_information(np.log(probabilities[:1]), elsewhere)
    np.testing.assert_allclose(scores, [[0.0, np.log(0.1 / 0.2)]], atol=1e-6)

    unknown = np.log([[0.2, np.nan], [0.4, np.nan], [np.nan, np.nan]])
    expected = [[np.log(0.2 / 0.3), np.nan], [np.log(0.4 / 0.3), np.nan], [np.nan, np.nan]]
    np.testing.assert_allclose(retrieval.mutual_information(unknown), expected)


def test_rerank_orders_the_candidates_and_leaves_the_rest_below_in_order():
    scores = np.array([[0.9, 0.8, 0.7, 0.1, 0.2], [1.0, 2.0, 3.0, 3.0, np.nan]])
    candidates = retrieval.top_k(scores, 3)
    assert candidates.tolist() == [[0, 1, 2], [2, 3, 1]]
    result = retrieval.rerank(scores, candidates, np.array([[-5.0, -3.0, -4.0], [0.0, 0.0, np.nan]]))
    assert np.argsort(-result[0]).tolist() == [1, 2, 0, 4, 3]
    assert result[1, 2] == result[1, 3] > result[1, 0]
    assert np.isnan(result[1, [1, 4]]).all()


@pytest.mark.parametrize(
    ("scores", "correct", "message"),
    [
        (np.zeros((0, 3)), np.zeros((0, 3), bool), "no empty axis"),
        (np.zeros((2, 3)), np.zeros((3, 2), bool), "one shape"),
        (np.zeros((2, 2)), np.eye(2), "boolean"),
        (np.zeros((2, 2)), np.array([[True, False], [False, False]]), "query 1 has no correct item"),
    ],
)
def test_bad_input_is_named(scores, correct, message):
    with pytest.raises(ValueError, match=message):
        retrieval.recall_at_k(scores, correct)
