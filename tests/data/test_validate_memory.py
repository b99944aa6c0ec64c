"""Looking through a list of a million rows, with all processes that it takes."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest


def tree_memory(root: int) -> int:
    """Proportional set size of a process and all it started, in KiB: what they share counts once."""
    parents, memory = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            found = re.search(r"^Pss:\s+(\d+)", (folder / "smaps_rollup").read_text(), re.M)
            memory[int(folder.name)] = int(found[1]) if found else 0
        except OSError:  # it has ended meanwhile, or is the kernel's
            continue
    tree = {root}
    while more := {pid for pid, parent in parents.items() if parent in tree} - tree:
        tree |= more
    return sum(memory.get(pid, 0) for pid in tree)


@pytest.mark.slow
def test_a_million_rows_are_looked_through_in_bounded_memory(tmp_path):
    with open(tmp_path / "train.jsonl", "w") as file:
        for i in range(1_000_000):
            fields = {"id": f"sample-{i:07d}", "image": f"{i}.jpg", "audio": f"{i}.flac"}
            fields |= {"caption": f"The ball number {i} is red and round.", "labels": [f"c{i % 80}"]}
            file.write(json.dumps(fields) + "\n")
    arguments = [str(tmp_path), "--split=train", "--quick", "--processes=2"]
    command = [sys.executable, "-m", "opt_jax.data.validate", *arguments]
    start, most = time.monotonic(), 0
    with open(tmp_path / "said", "w+") as said, subprocess.Popen(command, stdout=said) as process:
        while process.poll() is None:
            most = max(most, tree_memory(process.pid))
            time.sleep(0.3)
        said.seek(0)
        assert "1,000,000 rows = 1,000,000 usable + 0 unusable" in said.read()
    print(f"{time.monotonic() - start:.0f} s, {most >> 10} MiB")
    assert 50 < most >> 10 < 400
