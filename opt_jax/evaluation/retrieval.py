"""Cross-modal retrieval: recall at k over score matrices (OPT, arXiv 2107.00249, section 4, table 3).

Letters: Q queries, P items in the pool, k candidates. A score matrix is [Q, P], higher is better, and row q
ranks the pool for query q. Nothing here depends on the order of the pool: ties and NaN count against the
model.
"""

from collections.abc import Sequence

import numpy as np


def equal_captions(query_keys: np.ndarray, item_keys: np.ndarray) -> np.ndarray:
    """Items correct for a query: those with an equal caption key. Keys [Q] and [P] -> bool [Q, P]."""
    return np.asarray(query_keys)[:, None] == np.asarray(item_keys)[None, :]


def ranks(scores: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """0-based rank [Q] of the best correct item: the number of wrong items that score at least as high.

    Wrong items win ties, and NaN is worse than every number, so a model that gives constants or NaN finds
    nothing.
    """
    scores, correct = np.asarray(scores, np.float64), np.asarray(correct)
    if scores.ndim != 2 or scores.size == 0 or scores.shape != correct.shape:
        raise ValueError(
            f"retrieval needs scores and correct of one shape [queries, pool] with no empty axis, "
            f"found {scores.shape} and {correct.shape}"
        )
    if correct.dtype != np.bool_:
        raise ValueError(f"`correct` must be boolean, found {correct.dtype}")
    if not correct.any(axis=1).all():
        query = int(np.argmin(correct.any(axis=1)))
        raise ValueError(
            f"query {query} has no correct item in the pool of {scores.shape[1]}: add one or drop the query"
        )
    scores = np.where(np.isnan(scores), -np.inf, scores)
    best = np.where(correct, scores, -np.inf).max(axis=1, keepdims=True)
    return ((scores >= best) & ~correct).sum(axis=1)


def recall_at_k(scores: np.ndarray, correct: np.ndarray, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Percent of the queries with a correct item among the first k: {"R@1": ..., ...}.

    scores: [Q, P] float; correct: [Q, P] bool, see `equal_captions`.
    """
    if min(ks) < 1:
        raise ValueError(f"recall at k needs k >= 1, found {tuple(ks)}")
    rank = ranks(scores, correct)
    return {f"R@{k}": 100.0 * float(np.mean(rank < k)) for k in ks}


def standardise(scores: np.ndarray) -> np.ndarray:
    """Zero mean and unit deviation in each row [Q, P]; only finite entries count, others stay."""
    scores = np.asarray(scores, np.float64)
    finite = np.isfinite(scores)
    count = np.maximum(finite.sum(axis=1, keepdims=True), 1)
    centred = scores - np.where(finite, scores, 0.0).sum(axis=1, keepdims=True) / count
    deviation = np.sqrt(np.square(np.where(finite, centred, 0.0)).sum(axis=1, keepdims=True) / count)
    return centred / np.where(deviation > 0, deviation, 1.0)


def combine(scores: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Weighted sum [Q, P] of scorers, each standardised within each query first."""
    if not scores or len(scores) != len(weights):
        raise ValueError(f"combine needs one weight per score matrix, found {len(scores)} and {len(weights)}")
    shapes = {np.shape(matrix) for matrix in scores}
    if len(shapes) != 1:
        raise ValueError(f"score matrices to combine differ in shape: {sorted(shapes)}")
    total = np.zeros(shapes.pop())
    for matrix, weight in zip(scores, weights, strict=True):
        if weight == 0:
            continue  # a scorer that is switched off does not pass on its NaN either
        total += weight * standardise(matrix)
    return total


def debias(log_likelihood: np.ndarray) -> np.ndarray:
    """The log-likelihood [Q, P] minus its mean over the queries; only finite entries count."""
    log_likelihood = np.asarray(log_likelihood, np.float64)
    finite = np.isfinite(log_likelihood)
    mean = np.where(finite, log_likelihood, 0.0).sum(axis=0) / np.maximum(finite.sum(axis=0), 1)
    return log_likelihood - mean


def mutual_information(log_likelihood: np.ndarray, others: np.ndarray | None = None) -> np.ndarray:
    """Pointwise mutual information of texts with pictures or recordings, [Q, P] -> [Q, P].

    How likely a text is at all is estimated by its mean probability over `others`, so that a text that fits
    everything is no good answer. The mean is of probabilities: the mean of their logarithms is ruled by the
    pictures that a text contradicts, and calls every precise sentence unlikely. Where texts are the queries
    (the transpose), nothing changes within a row.

    Args:
      log_likelihood: log p(text p | query q). Infinite ones count as probability 0, NaN is left out.
      others: [N, P], log p(text p | other n). By default the queries themselves; each then knows whether its
        texts fit another query better.
    """
    log_likelihood = np.asarray(log_likelihood, np.float64)
    others = log_likelihood if others is None else np.asarray(others, np.float64)
    known = ~np.isnan(others)
    total = np.logaddexp.reduce(np.where(known, others, -np.inf), axis=0)
    with np.errstate(invalid="ignore"):  # a text that nothing allows
        return log_likelihood - (total - np.log(np.maximum(known.sum(axis=0), 1)))


def top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """Items [Q, min(k, P)] int of the highest scores, best first; NaN last."""
    scores = np.asarray(scores, np.float64)
    scores = np.where(np.isnan(scores), -np.inf, scores)
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def rerank(scores: np.ndarray, candidates: np.ndarray, candidate_scores: np.ndarray) -> np.ndarray:
    """Scores [Q, P] with the candidates ordered by a second scorer, above all others, which keep their order.

    scores: [Q, P] of the first scorer; candidates: [Q, k] distinct items per row, see `top_k`;
    candidate_scores: [Q, k]. Ties stay ties, and NaN stays NaN, so the result goes to `recall_at_k` as it
    is.
    """
    scores, candidate_scores = np.asarray(scores, np.float64), np.asarray(candidate_scores, np.float64)
    if candidates.shape != candidate_scores.shape or candidates.shape[0] != scores.shape[0]:
        raise ValueError(
            f"candidates {candidates.shape}, their scores {candidate_scores.shape} and all scores "
            f"{scores.shape} do not fit"
        )
    result = _positions(scores)
    np.put_along_axis(result, candidates, scores.shape[1] + _positions(candidate_scores), axis=1)
    return result


def _positions(scores: np.ndarray) -> np.ndarray:
    """Scores replaced by how many in the row are lower: the same order and ties, in the range [0, P)."""
    ordered = np.sort(scores, axis=1)  # NaN goes to the end
    lower = np.stack([np.searchsorted(row, values) for row, values in zip(ordered, scores, strict=True)])
    return np.where(np.isnan(scores), np.nan, lower.astype(np.float64))
