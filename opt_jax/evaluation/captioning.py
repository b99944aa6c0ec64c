"""Captioning metrics in the paper's unit, score times 100 (OPT, arXiv 2107.00249, table 6).

BLEU and ROUGE-L; CIDEr is in `cider`, METEOR in `meteor`; `caption_scores` gives them all. Words are those of
`caption_tokens`, close to the COCO caption server's, so that values can be laid beside published ones, except
METEOR's.
"""

from collections.abc import Mapping, Sequence

from sacrebleu.metrics import BLEU

from opt_jax.evaluation.caption_tokens import tokenize_pairs
from opt_jax.evaluation.cider import cider, cider_d
from opt_jax.evaluation.meteor import meteor

MAX_ORDER = 4
RECALL_WEIGHT = 1.2  # beta of ROUGE-L


def caption_scores(
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
    frequencies: Mapping[str, object] | None = None,
) -> dict[str, float]:
    """Of n captions, x 100: BLEU-1..4, METEOR (exact matches only), ROUGE-L, CIDEr (that is CIDEr-D, as in
    papers) and CIDEr-plain (CIDEr as first defined).

    frequencies: document frequencies for the last two, see `cider`. Other arguments and errors as in `bleu`.
    """
    return {
        **bleu(candidates, references),
        "METEOR-exact": meteor(candidates, references),
        "ROUGE-L": rouge_l(candidates, references),
        "CIDEr": cider_d(candidates, references, frequencies),
        "CIDEr-plain": cider(candidates, references, frequencies),
    }


def bleu(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Corpus BLEU of orders 1 to 4, x 100: {"BLEU-1": ..., "BLEU-4": ...} (Papineni et al. 2002, section 2).

    candidates: n texts (an empty one counts as a miss); references: for each, one or more texts. Counts are
    clipped by the most generous reference; the brevity penalty compares with the closest reference length,
    the shorter on a tie. Not smoothed: 0 where no n-gram is right (pycocoevalcap adds 1e-15 to the counts).
    Bad input is a ValueError, see `caption_tokens.tokenize_pairs`.
    """
    candidate_tokens, reference_tokens = tokenize_pairs(candidates, references)
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


def rouge_l(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """ROUGE-L x 100: mean over samples of the F-measure of longest common subsequences.

    Lin 2004 (W04-1013, section 3.1, eq. 2-4), F = (1 + b^2) R P / (R + b^2 P). As in the COCO caption server,
    b is 1.2, and P and R are each the largest over the references, maybe of two different ones. Arguments as
    in `bleu`; an empty candidate scores 0.
    """
    scores = []
    for candidate, sample in zip(*tokenize_pairs(candidates, references), strict=True):
        common = [longest_common_subsequence(candidate, reference) for reference in sample]
        if not any(common):
            scores.append(0.0)
            continue
        precision = max(common) / len(candidate)
        recall = max(c / len(reference) for c, reference in zip(common, sample, strict=True))
        squared = RECALL_WEIGHT**2
        scores.append((1 + squared) * recall * precision / (recall + squared * precision))
    return 100.0 * sum(scores) / len(scores)


def longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """How many words two sequences have in common in the same order, gaps allowed.

    Bit-parallel (Hyyro 2004, Bit-parallel LCS-length computation revisited): after each word of b, the zeros
    among the lowest len(a) bits mark where a row of the usual table goes up.
    """
    where: dict[str, int] = {}
    for i, word in enumerate(a):
        where[word] = where.get(word, 0) | 1 << i
    row = all_ones = (1 << len(a)) - 1
    for word in b:
        matches = row & where.get(word, 0)
        row = (row + matches | row - matches) & all_ones
    return len(a) - row.bit_count()
