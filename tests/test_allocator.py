"""Freed memory stays with the process: the second of two equal allocations costs no page faults."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource
import numpy as np
from opt_jax.allocator import keep_freed_memory

if "keep" == "{what}":
    assert keep_freed_memory()
np.ones(50 << 17)  # 50 MiB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    np.ones(50 << 17)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(what: str) -> int:
    command = [sys.executable, "-c", PROGRAM.format(what=what)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_a_second_allocation_costs_no_page_faults():
    assert faults("keep") < 1000 < faults("nothing")
