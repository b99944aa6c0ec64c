"""CIDEr and CIDEr-D x 100 (Vedantam et al. 2015, arXiv 1411.5726).

Each caption is four vectors, one for each n = 1..4: how often it has an n-gram, times the logarithm of how
many documents there are for each that has the n-gram. A document is all the references of one sample. Words
are those of `caption_tokens`, not stemmed, as in the evaluation servers.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from opt_jax.evaluation.caption_tokens import tokenize_pairs, tokenize_references

MAX_ORDER = 4
LENGTH_DEVIATION = 6.0  # sigma of the Gaussian length penalty of CIDEr-D, in words

Vector = Mapping[str, float]
Frequencies = Mapping[str, object] | str | os.PathLike


def cider(
    candidates: Sequence[str], references: Sequence[Sequence[str]], frequencies: Frequencies | None = None
) -> float:
    """CIDEr x 100: mean cosine of the vectors over samples, references and n (eq. 1-3); at most 100.

    candidates: n texts, an empty one scores 0; references: for each, one or more texts. frequencies: what
    `document_frequencies` gives, or a JSON file of it; by default the references' own, which make every
    weight, and so the score, 0 where there is one sample alone. Bad input is a ValueError, see
    `caption_tokens.tokenize_pairs`.
    """
    return 100.0 * _mean_similarity(candidates, references, frequencies, _cosine)


def cider_d(
    candidates: Sequence[str], references: Sequence[Sequence[str]], frequencies: Frequencies | None = None
) -> float:
    """CIDEr-D x 100: clipped counts, length penalty, factor 10 (eq. 4); at most 1000.

    What evaluation servers and papers call CIDEr. Arguments as in `cider`.
    """
    return 1000.0 * _mean_similarity(candidates, references, frequencies, _penalised_cosine)


def document_frequencies(references: Sequence[Sequence[str]]) -> dict[str, object]:
    """{"documents": n, "frequencies": {"a": ..., "a red": ...}}: in how many samples each n-gram is.

    references: for each of n samples, one or more texts. N-grams are words with single spaces between;
    `json.dump` writes what `cider` reads.
    """
    return _document_frequencies([[_ngrams(text) for text in s] for s in tokenize_references(references)])


def _ngrams(tokens: Sequence[str]) -> list[Counter]:
    """Counts of the n-grams of each order, 1 to 4."""
    return [
        Counter(" ".join(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
        for n in range(1, MAX_ORDER + 1)
    ]


def _document_frequencies(samples: Sequence[Sequence[list[Counter]]]) -> dict[str, object]:
    frequencies = Counter()
    for sample in samples:
        frequencies.update({ngram for text in sample for order in text for ngram in order})
    return {"documents": len(samples), "frequencies": dict(frequencies)}


def _loaded(frequencies: Frequencies) -> Mapping[str, object]:
    source = "document frequencies"
    if not isinstance(frequencies, Mapping):
        source = str(frequencies)
        frequencies = json.loads(Path(frequencies).read_text(encoding="utf-8"))
    if not isinstance(frequencies, Mapping) or not {"documents", "frequencies"} <= set(frequencies):
        raise ValueError(f"{source}: expected the keys 'documents' and 'frequencies' of document_frequencies")
    most = max(frequencies["frequencies"].values(), default=0)
    if frequencies["documents"] < max(most, 1):
        raise ValueError(f"{source}: an n-gram in {most} of {frequencies['documents']} documents")
    return frequencies


def _mean_similarity(
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
    frequencies: Frequencies | None,
    similarity: Callable[[Vector, Vector, int], float],
) -> float:
    """Mean of similarity(candidate's vector, reference's, difference in words), n by n."""
    candidate_tokens, reference_tokens = tokenize_pairs(candidates, references)
    samples = [[_ngrams(tokens) for tokens in sample] for sample in reference_tokens]
    known = _document_frequencies(samples) if frequencies is None else _loaded(frequencies)

    def vectors(orders: list[Counter]) -> list[dict[str, float]]:
        # An n-gram that no document has counts as one of a single document.
        return [
            {
                ngram: count * math.log(known["documents"] / max(known["frequencies"].get(ngram, 0), 1))
                for ngram, count in order.items()
            }
            for order in orders
        ]

    total = 0.0
    for tokens, sample_tokens, sample in zip(candidate_tokens, reference_tokens, samples, strict=True):
        candidate = vectors(_ngrams(tokens))
        similarities = [
            similarity(mine, theirs, len(tokens) - len(their_tokens))
            for their_tokens, orders in zip(sample_tokens, sample, strict=True)
            for mine, theirs in zip(candidate, vectors(orders), strict=True)
        ]
        total += sum(similarities) / len(similarities)
    return total / len(samples)


def _cosine(candidate: Vector, reference: Vector, length_difference: int) -> float:
    product = sum(value * reference.get(ngram, 0.0) for ngram, value in candidate.items())
    norm = math.hypot(*candidate.values()) * math.hypot(*reference.values())
    return product / norm if norm else 0.0


def _penalised_cosine(candidate: Vector, reference: Vector, length_difference: int) -> float:
    shared = ((value, reference[ngram]) for ngram, value in candidate.items() if ngram in reference)
    product = sum(min(mine, theirs) * theirs for mine, theirs in shared)
    norm = math.hypot(*candidate.values()) * math.hypot(*reference.values())
    penalty = math.exp(-(length_difference**2) / (2 * LENGTH_DEVIATION**2))
    return penalty * product / norm if norm else 0.0
