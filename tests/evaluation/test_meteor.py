import time
from fractions import Fraction

import pytest
from generated_captions import corpora

from opt_jax.evaluation.meteor import Alignment, align, meteor


def test_by_hand():
    # Matches: all 6 words, in three runs of the candidate: "on the mat", "sat", "the cat".
    assert align("on the mat sat the cat".split(), "the cat sat on the mat".split()) == Alignment(6, 3, 6, 6)
    assert meteor(["on the mat sat the cat"], [["the cat sat on the mat"]]) == pytest.approx(
        100 * (1 - 0.5 * (3 / 6) ** 3)
    )
    # P = 2/2, R = 2/4, one run: F-mean = 10 P R / (R + 9 P) = 5 / 9.5, penalty 0.5 / 8.
    assert meteor(["red dog"], [["a red dog runs"]]) == pytest.approx(100 * 5 / 9.5 * (1 - 0.5 / 8))


def test_the_best_reference_counts_and_the_corpus_is_summed():
    # 2 of 2 and 2, one run; 1 of 2 and 3, one run. P = 3/4, R = 3/5, penalty 0.5 (2/3)^3.
    score = meteor(["a dog", "red cat"], [["nothing", "a dog"], ["the cat sits"]])
    f_mean = 10 * 0.75 * 0.6 / (0.6 + 9 * 0.75)
    assert score == pytest.approx(100 * f_mean * (1 - 0.5 * (2 / 3) ** 3))


def test_equal_texts_keep_a_small_penalty_and_an_empty_one_scores_nothing():
    assert meteor(["A red dog."], [["a red dog"]]) == pytest.approx(100 * (1 - 0.5 / 27))
    assert meteor([""], [["a dog"]]) == 0.0
    assert meteor(["a cat", ""], [["a dog", "a cat"], ["a dog"]]) < meteor(["a cat"], [["a cat"]])


def test_fewest_chunks_of_the_alignments_with_the_most_matches():
    # Left to right, the first "a" to the first "a", would be three runs.
    assert align("a red dog a".split(), "a b a red dog".split()) == Alignment(4, 2, 4, 5)


def every_alignment(candidate, reference, taken=()):
    """(matches, -chunks) of every way to match equal words, by recursion over the candidate."""
    if len(taken) == len(candidate):
        pairs = [(i, place) for i, place in enumerate(taken) if place is not None]
        yield len(pairs), -sum((i - 1, place - 1) not in pairs for i, place in pairs)
        return
    word = candidate[len(taken)]
    yield from every_alignment(candidate, reference, (*taken, None))
    for place, other in enumerate(reference):
        if other == word and place not in taken:
            yield from every_alignment(candidate, reference, (*taken, place))


def test_agrees_with_its_formula_over_every_alignment():
    above_zero = 0
    for candidates, references in corpora(200, seed=5, longest=6):
        sums = [0, 0, 0, 0]  # matches, chunks, lengths
        for candidate, sample in zip(candidates, references, strict=True):
            found = []
            for reference in sample:
                words, others = candidate.split(), reference.split()
                matches, chunks = max(every_alignment(words, others))
                found.append((matches, -chunks, len(words), len(others)))
                assert align(words, others) == found[-1]
            best = max(found, key=lambda counts: direct(*counts))
            sums = [total + count for total, count in zip(sums, best, strict=True)]
        assert meteor(candidates, references) == pytest.approx(float(100 * direct(*sums)), abs=1e-9)
        above_zero += sums[0] > 0
    assert above_zero > 150


def direct(matches, chunks, candidate_length, reference_length):
    """10 P R / (R + 9 P) and its penalty in exact fractions, so that ties are ties."""
    if matches == 0:
        return Fraction(0)
    precision, recall = Fraction(matches, candidate_length), Fraction(matches, reference_length)
    f_mean = 10 * precision * recall / (recall + 9 * precision)
    return f_mean * (1 - Fraction(chunks, matches) ** 3 / 2)


def test_a_word_over_and_over_takes_no_time():
    started = time.monotonic()
    assert align(["a"] * 100, "a dog by a cat on a mat".split()) == Alignment(3, 3, 100, 8)
    assert align(["a"] * 40, ["a"] * 38) == Alignment(38, 1, 40, 38)
    assert time.monotonic() - started < 10


def test_an_empty_reference_is_named():
    with pytest.raises(ValueError, match="caption 1 has an empty reference"):
        meteor(["a", "b"], [["a"], ["b", "!"]])
