import math

import numpy as np
import pytest

from opt_jax.evaluation import captioning


def test_tokenize_splits_punctuation_off_and_keeps_words():
    assert captioning.tokenize("A dog, isn't it? It's well-lit.") == (
        ["a", "dog", "is", "n't", "it", "it", "'s", "well-lit"]
    )


def test_bleu_by_hand_with_several_references():
    # "the" counts 2 of 3 times, as in the most generous reference. Closest length 6: no penalty.
    candidate = "the cat the mat the hat"
    references = ["the cat is on the mat", "a hat"]
    scores = captioning.bleu([candidate], [references])
    assert scores["BLEU-1"] == pytest.approx(100 * 5 / 6)  # the x2, cat, mat, hat
    assert scores["BLEU-2"] == pytest.approx(100 * math.sqrt(5 / 6 * 2 / 5))  # the cat, the mat
    assert scores["BLEU-4"] == 0.0


def test_bleu_brevity_penalty_uses_the_closest_reference_over_the_corpus():
    # Lengths 3 + 2 against the closest references 4 + 2, not 9 + 2.
    scores = captioning.bleu(
        ["A red circle.", "blue square"],
        [["a red circle left", "a red circle on the left of a square"], ["blue square"]],
    )
    assert scores["BLEU-2"] == pytest.approx(100 * math.exp(1 - 6 / 5))


def test_cider_by_hand():
    # Two documents: a word of one weighs log 2, "a" is in both and weighs nothing. Words: (red, dog) = (1, 0)
    # against (1, 1), cosine 1 / sqrt 2. Pairs: "a red" against "a red", "red dog", 1 / sqrt 2 again. Nothing
    # longer. The second candidate shares nothing of weight.
    candidates, references = ["a red", "a dog"], [["a red dog"], ["a blue cat"]]
    cosine = (1 / math.sqrt(2)) * 2 / 4
    assert captioning.cider(candidates, references) == pytest.approx(100 * cosine / 2)
    penalty = math.exp(-1 / (2 * 6.0**2))
    assert captioning.cider_d(candidates, references) == pytest.approx(1000 * cosine * penalty / 2)


def test_cider_d_clips_repeated_words_and_cider_does_not():
    references = [["red dog"], ["blue cat"]]
    repeated, plain = (
        captioning.cider_d(["red red", ""], references),
        captioning.cider_d(["red", ""], references),
    )
    # min(2, 1) * 1 over 2 * sqrt 2, without penalty; the clip halves it. Unclipped both are 1 / sqrt 2.
    assert repeated == pytest.approx(1000 / (2 * math.sqrt(2)) / 4 / 2)
    assert plain == pytest.approx(1000 / math.sqrt(2) * math.exp(-1 / 72) / 4 / 2)
    assert captioning.cider(["red red", ""], references) == pytest.approx(
        captioning.cider(["red", ""], references)
    )


def test_scores_agree_with_the_published_evaluation_code():
    # Expected values: pycocoevalcap 1.2, CiderScorer(n=4, sigma=6) and BleuScorer(n=4, option="closest").
    words = "a red blue small large circle square left of the near green".split()
    rng = np.random.default_rng(3)
    references = [
        [" ".join(rng.choice(words, size=rng.integers(4, 12))) for _ in range(rng.integers(1, 5))]
        for _ in range(12)
    ]
    candidates = [" ".join(sample[0].split()[:8] + ["near"]) for sample in references]
    scores = captioning.caption_scores(candidates, references)
    assert scores["CIDEr"] == pytest.approx(420.6468, abs=1e-4)
    assert [scores[f"BLEU-{n}"] for n in range(1, 5)] == pytest.approx(
        [89.3617, 88.5799, 86.6297, 84.7388], abs=1e-4
    )


@pytest.mark.parametrize(
    ("candidates", "references", "message"),
    [
        ([], [], "no candidate"),
        (["a"], [["a"], ["b"]], "references for 2"),
        (["a", "b"], [["a"], []], "caption 1 has an empty reference"),
        (["a"], [["a", "..."]], "caption 0 has an empty reference"),
        (["a"], ["a"], "must be a list"),
    ],
)
def test_bad_input_is_named(candidates, references, message):
    for metric in (captioning.bleu, captioning.cider, captioning.cider_d):
        with pytest.raises(ValueError, match=message):
            metric(candidates, references)
