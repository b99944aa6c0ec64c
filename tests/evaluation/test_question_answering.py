from pathlib import Path

import numpy as np
import pytest

from opt_jax.evaluation.question_answering import (
    answer_accuracies,
    normalise_answer,
    soft_scores,
    vqa_accuracy,
)

# Made-up answers, and what processPunctuation and processDigitArticle of the official code make of them.
PUBLISHED = [
    line.split("\t") for line in Path(__file__).with_name("vqa_answers.tsv").read_text().splitlines()
]


def test_answers_are_made_alike_as_by_the_official_code():
    assert len(PUBLISHED) == 200
    assert {answer: normalise_answer(answer) for answer, _ in PUBLISHED} == dict(PUBLISHED)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The dog.", "dog"),
        ("Two\tdogs\n", "2 dogs"),
        ("none", "0"),
        ("black/white", "black white"),
        ("black, white", "black white"),
        ("100,978 - or so", "100978 or so"),
        ("2:50 p.m.", "2:50 pm"),
        ("3.5 ft.", "3.5 ft"),
        ("dont", "don't"),
        ("girl's t-shirt", "girl's t shirt"),
        ("a", ""),
    ],
)
def test_by_hand(answer, expected):
    assert normalise_answer(answer) == expected


def test_accuracy_by_hand():
    # The example of issue 1 of the official code: eight "yes", two "no".
    answers = ["yes"] * 8 + ["no"] * 2
    np.testing.assert_allclose(answer_accuracies(["yes", "no", "maybe"], [answers] * 3), [1.0, 0.6, 0.0])
    assert vqa_accuracy(["Yes!", "the no", ""], [answers] * 3) == pytest.approx(100 * 1.6 / 3)


def test_a_blank_prediction_is_wrong_even_where_nothing_is_left_of_the_answers():
    answers = ["the"] * 5 + ["a"] * 5
    assert answer_accuracies(["", " ", "an"], [answers] * 3).tolist() == [0.0, 0.0, 1.0]


def test_where_all_people_agree_nothing_is_changed():
    answers = [["stop!"] * 10, ["STOP"] + ["stop!"] * 9]
    assert answer_accuracies(["stop", "stop"], answers).tolist() == [0.0, 1.0]
    assert answer_accuracies([" stop!\n"], answers[:1]).tolist() == [1.0]


def test_accuracy_agrees_with_its_closed_form():
    # With m of n people: m times one of them is left out, n - m times another.
    rng = np.random.default_rng(0)
    predictions, answers, expected = [], [], []
    for _ in range(300):
        given = [str(a) for a in rng.choice(["yes", "no", "red", "2"], size=rng.integers(2, 13))]
        prediction = str(rng.choice(["yes", "no", "red", "2", "cat"]))
        m, n = given.count(prediction), len(given)
        expected.append((m * min(1, (m - 1) / 3) + (n - m) * min(1, m / 3)) / n if m else 0.0)
        predictions.append(prediction)
        answers.append(given)
    np.testing.assert_allclose(answer_accuracies(predictions, answers), expected, atol=1e-12)
    assert vqa_accuracy(predictions, answers) == pytest.approx(100 * np.mean(expected), abs=1e-9)


def test_soft_scores_are_the_accuracies_of_the_answers():
    given = ["red"] + ["Blue"] * 2 + ["dark-green"] * 3 + ["two", "2", "2", "two."]
    found = soft_scores(map(normalise_answer, given))
    assert found == pytest.approx({"red": 0.3, "blue": 0.6, "dark green": 0.9, "2": 1.0})
    rng = np.random.default_rng(1)
    for _ in range(200):
        given = [str(a) for a in rng.choice(["Yes", "yes.", "the", "no", "one", "1", "a cat"], size=10)]
        for answer, score in soft_scores(map(normalise_answer, given)).items():
            assert answer_accuracies([answer], [given])[0] == score > 0
    assert soft_scores(["", "", "", "no"]) == pytest.approx({"no": 0.25})


@pytest.mark.parametrize(
    ("predictions", "answers", "message"),
    [
        ([], [], "no answers"),
        (["a"], [["a", "b"]] * 2, "people's to 2 questions"),
        (["a", "b"], [["a", "b"], ["a", " "]], "question 1 needs two or more answers"),
        (["a"], [["a"]], "question 0 needs two or more"),
        (["a"], ["ab"], "question 0 must be a list"),
    ],
)
def test_bad_input_is_named(predictions, answers, message):
    with pytest.raises(ValueError, match=message):
        answer_accuracies(predictions, answers)
