from opt_jax.evaluation.differences import closest, word_differences


def test_words_are_marked_as_missing_or_extra():
    assert word_differences("a big red dog", "a red cat now") == [
        ("same", "a"),
        ("missing", "big"),
        ("same", "red"),
        ("missing", "dog"),
        ("extra", "cat now"),
    ]


def test_case_and_punctuation_make_no_difference():
    assert word_differences("A dog, here.", "a dog here") == [("same", "a dog here")]


def test_nothing_said():
    assert word_differences("a dog", "") == [("missing", "a dog")]


def test_closest_reference():
    assert closest(["two cats", "A red dog.", "a blue fish"], "the red dog") == "A red dog."
