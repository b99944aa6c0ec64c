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


def test_silence_is_all_deletions_and_babble_exceeds_100():
    assert error_rates(["a dog"], [""]) == {"WER": 100.0, "CER": 100.0}
    assert error_rates(["dog"], ["x y z"])["WER"] == 300.0


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
