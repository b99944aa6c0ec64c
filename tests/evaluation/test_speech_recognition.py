import numpy as np
import pytest

from opt_jax.evaluation.speech_recognition import error_rates


def test_rates_by_hand():
    # "read" for "red": one word of three, one character of nine.
    # " dog" deleted: one word of two, four characters of seven.
    rates = error_rates(["a red cat", "big dog"], ["a read cat", "big"])
    assert rates == pytest.approx({"WER": 100 * 2 / 5, "CER": 100 * (1 + 4) / (9 + 7)})


def test_case_and_punctuation_are_not_errors_but_apostrophes_are():
    assert error_rates(["It's a Dog."], ["it's a dog"]) == {"WER": 0.0, "CER": 0.0}
    assert error_rates(["it's a dog"], ["its a dog"])["WER"] == pytest.approx(100 / 3)


def test_an_apostrophe_is_one_however_it_is_printed():
    assert error_rates(["don\u2019t"], ["don't"])["WER"] == 0.0


def test_silence_is_all_deletions_and_babble_exceeds_100():
    assert error_rates(["a dog"], [""]) == {"WER": 100.0, "CER": 100.0}
    assert error_rates(["dog"], ["x y z"])["WER"] == 300.0


def edits(a, b):
    """Levenshtein distance, row by row."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]


def test_rates_agree_with_their_formula():
    rng = np.random.default_rng(0)
    words = "a red dog did not see the cat's bed".split()

    def text(shortest):
        return " ".join(rng.choice(words, size=rng.integers(shortest, 9)))

    for _ in range(200):
        references = [text(1) for _ in range(rng.integers(1, 5))]
        hypotheses = [text(0) for _ in references]
        expected = {}
        for name, units in (("WER", str.split), ("CER", list)):
            wrong = sum(edits(units(a), units(b)) for a, b in zip(references, hypotheses, strict=True))
            expected[name] = 100 * wrong / sum(len(units(a)) for a in references)
        assert error_rates(references, hypotheses) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("references", "hypotheses", "message"),
    [
        ([], [], "no transcripts"),
        (["a"], [], "1 reference"),
        (["a", "?!"], ["a", "b"], "reference transcript 1 is empty"),
    ],
)
def test_bad_input_is_named(references, hypotheses, message):
    with pytest.raises(ValueError, match=message):
        error_rates(references, hypotheses)
