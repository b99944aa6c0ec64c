"""Captioning metrics in the paper's unit, score times 100: BLEU-1..4, CIDEr (OPT, arXiv 2107.00249, table 6).

BLEU is sacrebleu's corpus BLEU without smoothing, over the tokens of `tokenize`. CIDEr follows Vedantam et
al. 2015 (arXiv 1411.5726). What evaluation servers and papers call "CIDEr" is CIDEr-D, and so it is in
`caption_scores`.
"""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from sacrebleu.metrics import BLEU

MAX_ORDER = 4
LENGTH_DEVIATION = 6.0  # sigma of the Gaussian length penalty of CIDEr-D, in words
# Close to the Penn Treebank's: "don't" -> "do n't", "it's" -> "it 's"; "well-lit" and "1,000" stay whole.
_TOKEN = re.compile(r"\w+(?=n't\b)|n't\b|'\w+|\w+(?:[-.,/]\w+)*")


def tokenize(text: str) -> list[str]:
    """Lower-case words; punctuation separates and is left out, as caption evaluation does."""
    return _TOKEN.findall(text.lower())


def bleu(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Corpus BLEU of orders 1 to 4, x 100: {"BLEU-1": ..., "BLEU-4": ...}.

    candidates: n texts (an empty one counts as a miss); references: for each, one or more texts. Counts are
    clipped by the most generous reference; the brevity penalty compares with the closest reference length,
    the shorter on a tie.
    """
    candidate_tokens, reference_tokens = _checked(candidates, references)
    lines = [" ".join(tokens) for tokens in candidate_tokens]
    # sacrebleu wants one list per reference position; None stands for "this sample has fewer".
    columns = [
        [" ".join(sample[i]) if i < len(sample) else None for sample in reference_tokens]
        for i in range(max(map(len, reference_tokens)))
    ]
    return {
        f"BLEU-{n}": BLEU(max_ngram_order=n, tokenize="none", smooth_method="none", force=True)
        .corpus_score(lines, columns)
        .score
        for n in range(1, MAX_ORDER + 1)
    }


def cider(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr x 100: mean cosine of TF-IDF vectors, n = 1..4, not stemmed (arXiv 1411.5726, eq. 1-3)."""
    return 100.0 * _mean_similarity(candidates, references, _cosine)


def cider_d(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr-D x 100: clipped counts, length penalty, factor 10 (arXiv 1411.5726, eq. 4); at most 1000."""
    return 1000.0 * _mean_similarity(candidates, references, _clipped_cosine)


def caption_scores(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """BLEU-1..4 and CIDEr (that is CIDEr-D) of a set of captions, x 100."""
    return {**bleu(candidates, references), "CIDEr": cider_d(candidates, references)}


def _checked(candidates, references) -> tuple[list[list[str]], list[list[list[str]]]]:
    if len(candidates) == 0:
        raise ValueError("no candidate captions to score")
    if len(candidates) != len(references):
        raise ValueError(f"{len(candidates)} candidate captions, but references for {len(references)}")
    for i, sample in enumerate(references):
        if isinstance(sample, str):
            raise ValueError(f"references of caption {i} must be a list of texts, found one text {sample!r}")
        if not sample or not all(tokenize(text) for text in sample):
            raise ValueError(f"caption {i} has an empty reference: {list(sample)!r}")
    return [tokenize(text) for text in candidates], [
        [tokenize(text) for text in sample] for sample in references
    ]


def _ngrams(tokens: list[str]) -> Counter:
    return Counter(
        tuple(tokens[i : i + n]) for n in range(1, MAX_ORDER + 1) for i in range(len(tokens) - n + 1)
    )


def _mean_similarity(candidates, references, similarity) -> float:
    """Mean over samples, references and orders; document frequencies come from the references."""
    candidate_tokens, reference_tokens = _checked(candidates, references)
    counts = [[_ngrams(tokens) for tokens in sample] for sample in reference_tokens]
    document_frequency = Counter(ngram for sample in counts for ngram in set().union(*sample))
    log_documents = np.log(len(references))

    def vectors(ngrams: Counter) -> list[dict]:
        by_order = [{} for _ in range(MAX_ORDER)]
        for ngram, count in ngrams.items():
            # An n-gram of no reference counts as one of a single document.
            by_order[len(ngram) - 1][ngram] = count * (
                log_documents - np.log(max(document_frequency[ngram], 1))
            )
        return by_order

    scores = []
    for tokens, sample_tokens, sample in zip(candidate_tokens, reference_tokens, counts, strict=True):
        candidate = vectors(_ngrams(tokens))
        scores.append(
            np.mean(
                [
                    similarity(mine, theirs, len(tokens) - len(their_tokens))
                    for their_tokens, ngrams in zip(sample_tokens, sample, strict=True)
                    for mine, theirs in zip(candidate, vectors(ngrams), strict=True)
                ]
            )
        )
    return float(np.mean(scores))


def _cosine(candidate: dict, reference: dict, length_difference: int) -> float:
    norm = _norm(candidate) * _norm(reference)
    return (
        sum(value * reference.get(ngram, 0.0) for ngram, value in candidate.items()) / norm if norm else 0.0
    )


def _clipped_cosine(candidate: dict, reference: dict, length_difference: int) -> float:
    clipped = {ngram: min(value, reference.get(ngram, 0.0)) for ngram, value in candidate.items()}
    norm = _norm(candidate) * _norm(reference)
    product = sum(value * reference.get(ngram, 0.0) for ngram, value in clipped.items())
    return product / norm * np.exp(-(length_difference**2) / (2 * LENGTH_DEVIATION**2)) if norm else 0.0


def _norm(vector: dict) -> float:
    return float(np.sqrt(sum(value * value for value in vector.values())))
