"""Two processes with two devices each train as one process does, and go on from their checkpoint."""

import json
import socket
import subprocess
import sys

import numpy as np
import pytest

PROGRAM = """
import sys
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

port, number, processes, workdir, steps = sys.argv[1], *map(int, sys.argv[2:4]), sys.argv[4], int(sys.argv[5])
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4 // processes)
if processes > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", processes, number)
from opt_jax.train import Task, train

class Data:
    def from_step(self, step):
        while True:
            rows = np.random.default_rng(step).standard_normal((8, 3)).astype(np.float32)
            yield {"x": np.split(rows, processes)[number]}
            step += 1

task = Task(
    init=lambda key, batch: {"kernel": jax.random.normal(key, (3, 3))},
    losses=lambda params, batch, key, step: {
        "square": (jnp.sum((batch["x"] @ params["kernel"] - batch["x"]) ** 2), jnp.float32(len(batch["x"])))
    },
    weights={"square": 1.0},
)
config = ConfigDict(dict(steps=steps, batch_size=8, learning_rate=0.1, decay="constant", log_every=2))
params = train(task, Data(), config, workdir, name="t", seed=0, fingerprint={})
np.save(f"{workdir}/params{number}.npy", jax.device_get(params["kernel"]))
"""


def run(workdir, processes, steps):
    workdir.mkdir(exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = [str(port), "{}", str(processes), str(workdir), str(steps)]
    children = [
        subprocess.Popen([sys.executable, "-c", PROGRAM, *(a.format(number) for a in arguments)])
        for number in range(processes)
    ]
    assert [child.wait(timeout=120) for child in children] == [0] * processes
    return [np.load(workdir / f"params{number}.npy") for number in range(processes)]


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    (wanted,) = run(tmp_path / "one", 1, 6)
    run(tmp_path / "two", 2, 4)
    for found in run(tmp_path / "two", 2, 6):
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
    lines = [json.loads(line) for line in (tmp_path / "two/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
