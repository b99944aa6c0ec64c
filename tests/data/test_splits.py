import numpy as np
import pytest

from opt_jax.data.splits import check_splits, too_few
from opt_jax.data.triplet import SourceError


class Rows:
    modalities = ("text", "image")

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count


def test_validation_needs_a_whole_batch_where_losses_are_taken_of_it():
    splits = {"train": Rows(8), "validation": Rows(3), "test": Rows(3)}
    check_splits(splits, 4, validates=False)
    check_splits(splits | {"validation": Rows(4)}, 4, validates=True)
    with pytest.raises(SourceError, match="validation split has 3 rows.*set config.train.validate_every"):
        check_splits(splits, 4, validates=True)


def test_a_batch_is_filled_by_visits():
    assert too_few(4, None, 4) == "" == too_few(2, np.array([3.0, 1.5]), 4)
    assert too_few(9, np.full(9, 0.25), 4).startswith("2 rows, which do not fill a batch")
