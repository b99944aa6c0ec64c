import subprocess
import sys

import numpy as np
import pytest

from opt_jax.data.plan import host_slice, plan_epoch, report, stacked_length, steps_per_epoch

BUCKETS = ((6, 4), (8, 8), (10, 16))


def rows(number=103, seed=0):
    random = np.random.default_rng(seed)
    text, audio = random.integers(3, 12, number), random.integers(1, 20, number)
    return text, audio, random.random((number, 3)) < 0.8


def test_same_arguments_same_plan_and_epochs_differ():
    lengths = rows()
    one, two, other = (
        plan_epoch(seed, epoch, *lengths, 8, BUCKETS) for seed, epoch in [(3, 1), (3, 1), (3, 2)]
    )
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a.indices, b.indices)
        assert (a.text_length, a.audio_length) == (b.text_length, b.audio_length)
    assert any((a.indices != b.indices).any() for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(("number", "size"), [(103, 8), (64, 8), (8, 8), (20, 7)])
def test_every_row_once_but_for_the_rest(number, size):
    lengths = rows(number)
    left_out = []
    for epoch in range(4):
        batches = plan_epoch(0, epoch, *lengths, size, BUCKETS)
        assert len(batches) == steps_per_epoch(number, size) == number // size
        visited = np.concatenate([batch.indices for batch in batches])
        assert all(len(batch.indices) == size for batch in batches)
        assert len(np.unique(visited)) == len(visited) == number // size * size
        left_out.append(sorted(set(range(number)) - set(visited)))
    assert number % size == 0 or len(set(map(tuple, left_out))) > 1


def test_rows_fit_their_bucket_and_short_ones_stay_low():
    text, audio, presence = rows(400)
    used_text = np.where(presence[:, 0], text, 1)
    used_audio = np.where(presence[:, 2], audio, 0)
    batches = plan_epoch(0, 0, text, audio, presence, 16, BUCKETS)
    higher = 0
    for batch in batches:
        if (batch.text_length, batch.audio_length) != BUCKETS[-1]:
            assert (used_text[batch.indices] <= batch.text_length).all()
            assert (used_audio[batch.indices] <= batch.audio_length).all()
        lower = [bucket for bucket in BUCKETS if bucket[1] < batch.audio_length]
        for t, a in lower[-1:]:
            higher += ((used_text[batch.indices] <= t) & (used_audio[batch.indices] <= a)).sum()
    assert higher < 2 * 16  # what is carried up is less than a batch a bucket
    assert len({batch.audio_length for batch in batches}) == 3
    order = [batch.audio_length for batch in batches]
    assert order != sorted(order)


def test_report_by_hand():
    text, audio = np.array([3, 4, 9, 5]), np.array([2, 4, 9, 7])
    presence = np.array([[1, 1, 1], [1, 1, 1], [1, 1, 1], [0, 1, 0]], bool)
    batches = plan_epoch(0, 0, text, audio, presence, 4, [(8, 8)])
    # Positions: 4 * 16 = 64. Used: 3 + 2, 4 + 4, 8 + 8 (cut), 1 + 0 ([CLS] alone) = 30.
    assert report(batches, text, audio, presence) == {
        "padded_fraction": 34 / 64,
        "truncated_text": 1,
        "truncated_audio": 1,
        "left_out": 0,
        "batches": 1,
        "shapes": 1,
    }


def test_buckets_waste_less_than_one_length():
    lengths = rows(400)
    several = report(plan_epoch(0, 0, *lengths, 16, BUCKETS), *lengths)
    one = report(plan_epoch(0, 0, *lengths, 16, BUCKETS[-1:]), *lengths)
    assert several["padded_fraction"] < one["padded_fraction"] - 0.05


def test_host_slices_make_up_the_batch():
    indices = np.arange(12)[::-1]
    np.testing.assert_array_equal(np.concatenate([host_slice(indices, i, 3) for i in range(3)]), indices)
    with pytest.raises(ValueError, match="12 rows cannot be cut evenly for 5 hosts"):
        host_slice(indices, 0, 5)


def test_errors():
    with pytest.raises(ValueError, match="grow"):
        plan_epoch(0, 0, *rows(), 8, [(8, 8), (6, 16)])
    with pytest.raises(ValueError, match="7 rows do not fill one batch of 8"):
        plan_epoch(0, 0, *rows(7), 8, BUCKETS)


def test_stacked_length():
    assert stacked_length(np.array([0, 1, 4, 5]), 4).tolist() == [0, 1, 1, 2]


def test_plan_stays_the_same_from_version_to_version():
    """A change of the order would silently change what a resumed run sees."""
    text, audio = np.array([3, 9, 4, 8, 3, 4]), np.array([1, 9, 2, 8, 2, 1])
    batches = plan_epoch(1, 2, text, audio, np.ones((6, 3), bool), 2, [(4, 4), (10, 10)])
    assert [(batch.indices.tolist(), batch.text_length) for batch in batches] == [
        ([2, 5], 4),
        ([3, 1], 10),
        ([4, 0], 4),
    ]


MEASURE = r"""
import re, time
import numpy as np
from opt_jax.data.plan import plan_epoch
def peak():  # KiB; what getrusage gives starts at the peak of the process that started this one
    return int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])
random, rows = np.random.default_rng(0), 1_000_000
text, audio = (random.integers(1, most, rows, np.int32) for most in (128, 384))
presence = random.random((rows, 3), np.float32) < 0.9
before, start = peak(), time.monotonic()
batches = plan_epoch(0, 0, text, audio, presence, 256, ((32, 96), (64, 192), (128, 384)))
assert len(batches) == rows // 256
print(time.monotonic() - start, peak() - before >> 10)
"""


def test_an_epoch_of_a_million_rows_is_planned_in_bounded_memory():
    seconds, grown = subprocess.check_output([sys.executable, "-c", MEASURE], text=True).split()
    print(f"1,000,000 rows: {float(seconds):.2f} s, {grown} MiB")
    assert float(seconds) < 10 and 4 < int(grown) < 100
