"""Comparing two models on the same pools: the paired mean difference and its standard error."""

import numpy as np


def pools(count: int, number: int, seed: int = 0) -> list[np.ndarray]:
    """`number` disjoint pools of equal size: sorted indices out of range(count), the remainder left out."""
    if not 1 <= number <= count:
        raise ValueError(f"cannot make {number} pools out of {count} samples")
    size = count // number
    order = np.random.default_rng(seed).permutation(count)
    return [np.sort(order[i * size : (i + 1) * size]) for i in range(number)]


def paired_difference(a, b) -> tuple[float, float]:
    """(mean of a - b, its standard error); a, b: one metric on the same pools, [pools] each, at least two."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 1 or a.shape != b.shape or len(a) < 2:
        raise ValueError(
            f"paired comparison needs the same two or more pools twice, found {a.shape}, {b.shape}"
        )
    difference = a - b
    return float(difference.mean()), float(difference.std(ddof=1) / np.sqrt(len(difference)))
