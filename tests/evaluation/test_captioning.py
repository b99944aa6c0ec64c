import math
from collections import Counter
from functools import cache, reduce

import numpy as np
import pytest
from generated_captions import corpora

from opt_jax.evaluation import captioning
from opt_jax.evaluation.cider import cider, document_frequencies


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


def direct_bleu(candidates, references, order):
    def ngrams(text, n):
        words = text.split()
        return Counter(zip(*(words[i:] for i in range(n)), strict=False))

    precisions = []
    for n in range(1, order + 1):
        hits = total = 0
        for candidate, sample in zip(candidates, references, strict=True):
            most = reduce(Counter.__or__, (ngrams(reference, n) for reference in sample))
            hits += (ngrams(candidate, n) & most).total()
            total += ngrams(candidate, n).total()
        precisions.append(hits / total if total else 0.0)
    lengths = [len(candidate.split()) for candidate in candidates]
    closest = [
        min((len(reference.split()) for reference in sample), key=lambda m: (abs(m - length), m))
        for length, sample in zip(lengths, references, strict=True)
    ]
    if not all(precisions):
        return 0.0
    penalty = min(1.0, math.exp(1 - sum(closest) / sum(lengths)))
    return 100 * penalty * math.prod(precisions) ** (1 / order)


def test_bleu_agrees_with_its_formula():
    above_zero = 0
    for candidates, references in corpora(250, seed=0):
        scores = captioning.bleu(candidates, references)
        expected = {f"BLEU-{n}": direct_bleu(candidates, references, n) for n in range(1, 5)}
        assert scores == pytest.approx(expected, abs=1e-9)
        above_zero += expected["BLEU-4"] > 0
    assert above_zero > 100


def test_rouge_l_by_hand():
    # "the cat sat": common 3 of its 5 words with the first reference (3 of 6), 2 with the second (2 of 2).
    # So P = 3/5 of the first and R = 1 of the second. The second candidate has nothing in common.
    candidates = ["the black cat sat there", "dog"]
    references = [["the cat that sat over it", "cat sat"], ["cat"]]
    f = (1 + 1.44) * 0.6 / (1 + 1.44 * 0.6)
    assert captioning.rouge_l(candidates, references) == pytest.approx(100 * f / 2)
    assert captioning.rouge_l(["a red dog"], [["A red dog."]]) == pytest.approx(100)
    assert captioning.rouge_l([""], [["a dog"]]) == 0.0


def direct_common(a, b):
    @cache
    def longest(i, j):
        if i == len(a) or j == len(b):
            return 0
        return 1 + longest(i + 1, j + 1) if a[i] == b[j] else max(longest(i + 1, j), longest(i, j + 1))

    return longest(0, 0)


def test_rouge_l_agrees_with_its_formula():
    for candidates, references in corpora(250, seed=1):
        scores = []
        for candidate, sample in zip(candidates, references, strict=True):
            words, others = candidate.split(), [reference.split() for reference in sample]
            common = [direct_common(words, other) for other in others]
            assert [captioning.longest_common_subsequence(words, other) for other in others] == common
            precision = max(c / max(len(words), 1) for c in common)
            recall = max(c / len(other) for c, other in zip(common, others, strict=True))
            harmonic = 1 / precision + 1.2**2 / recall if precision else math.inf
            scores.append((1 + 1.2**2) / harmonic)
        assert captioning.rouge_l(candidates, references) == pytest.approx(100 * np.mean(scores), abs=1e-9)


def test_scores_agree_with_the_published_evaluation_code():
    # Expected values: pycocoevalcap 1.2, CiderScorer(n=4, sigma=6), BleuScorer(n=4, option="closest"), Rouge,
    # and its METEOR 1.5 with the options that `meteor` names.
    words = "a red blue small large circle square left of the near green".split()
    rng = np.random.default_rng(3)
    references = [
        [" ".join(rng.choice(words, size=rng.integers(4, 12))) for _ in range(rng.integers(1, 5))]
        for _ in range(12)
    ]
    candidates = [" ".join(sample[0].split()[:8] + ["near"]) for sample in references]
    scores = captioning.caption_scores(candidates, references)
    assert scores["CIDEr"] == pytest.approx(420.6468, abs=1e-4)
    assert scores["CIDEr-plain"] == cider(candidates, references) > 0
    frequencies = document_frequencies([*references, ["a red dog"]])
    elsewhere = captioning.caption_scores(candidates, references, frequencies)
    assert {name for name in scores if scores[name] != elsewhere[name]} == {"CIDEr", "CIDEr-plain"}
    assert [scores[f"BLEU-{n}"] for n in range(1, 5)] == pytest.approx(
        [89.3617, 88.5799, 86.6297, 84.7388], abs=1e-4
    )
    assert scores["ROUGE-L"] == pytest.approx(90.67765991794307, abs=1e-9)
    assert scores["METEOR-exact"] == pytest.approx(91.47654196258547, abs=1e-9)


@pytest.mark.parametrize("metric", [captioning.bleu, captioning.rouge_l, captioning.caption_scores])
def test_an_empty_reference_is_named(metric):
    with pytest.raises(ValueError, match="caption 1 has an empty reference"):
        metric(["a", "b"], [["a"], [""]])
