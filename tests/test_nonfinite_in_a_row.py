"""A run that has failed for good ends soon, however seldom it logs."""

import pytest
from test_train import Data, lines, run

from opt_jax.train import NonFiniteError


def test_failures_in_a_row_end_the_run_long_before_the_next_log_line(tmp_path):
    read, poisoned = [], range(2, 40)
    with pytest.raises(NonFiniteError, match="step 5: the loss 'restore' is not finite, 3 steps in a row"):
        run(tmp_path, data=Data(poisoned, read.append), steps=40, log_every=40, max_nonfinite=3)
    assert [line["step"] for line in lines(tmp_path)] == [9] and len(read) < 20


def test_failures_that_are_fewer_are_told_at_the_log_line(tmp_path, capsys):
    run(tmp_path, data=Data(poisoned=(1, 2, 4, 5)), steps=8, log_every=8, max_nonfinite=3)
    assert capsys.readouterr().out.count("update skipped") == 4
    assert [(line["step"], line["skipped"]) for line in lines(tmp_path)] == [(8, 4)]
