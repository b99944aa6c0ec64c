import math

import numpy as np
import pytest

from opt_jax.evaluation import paired


def test_pools_are_disjoint_and_equal():
    parts = paired.pools(17, 5, seed=2)
    assert [len(part) for part in parts] == [3] * 5
    assert len(np.unique(np.concatenate(parts))) == 15
    with pytest.raises(ValueError, match="6 pools out of 5"):
        paired.pools(5, 6)


def test_paired_difference_by_hand():
    # Differences 1, 2, 3: mean 2, sample deviation 1.
    assert paired.paired_difference([11, 22, 33], [10, 20, 30]) == pytest.approx((2.0, 1 / math.sqrt(3)))


def test_one_pool_is_refused():
    with pytest.raises(ValueError, match="two or more pools"):
        paired.paired_difference([1.0], [1.0])
