"""Eight simulated CPU devices for every test, so that meshes can be compared on one machine."""

import functools
import os
import re
import signal
import tempfile
from pathlib import Path

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # Started in the background by a script: what tests interrupt would inherit that it is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ["JAX_PLATFORMS"] = "cpu"
FLAGS = ("--xla_force_host_platform_device_count=8", "--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *FLAGS))

import jax  # noqa: E402  (after the environment that it reads at import)
import pytest  # noqa: E402
from xdist.scheduler import LoadFileScheduling  # noqa: E402

cache = Path(tempfile.gettempdir()) / f"opt_jax_tests_{os.getuid()}"
jax.config.update("jax_compilation_cache_dir", str(cache))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
# What is compiled here runs a few times: compiling is most of the work. It takes half as long without these
# optimizations, and half of that again with the older way (above) of making kernels.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """Working directory of the smallest pre-training, evaluated. Tests leave it as it is, or mended."""
    from test_pipeline import smallest_config

    from opt_jax import pipeline

    workdir = tmp_path_factory.mktemp("pretrained")
    pipeline.run(smallest_config(workdir), workdir)
    return workdir


class OncePretrained(LoadFileScheduling):
    """Files go to processes whole; those that ask for `pretrained` all to the one process that makes it."""

    def _split_scope(self, nodeid):
        file = super()._split_scope(nodeid)
        return "pretrained" if asks_for_pretrained(self.config.rootpath / file) else file


@functools.cache  # a file is looked at for each of its tests
def asks_for_pretrained(path: Path) -> bool:
    return re.search(r"^def \w+\(.*\bpretrained\b", path.read_text(), re.MULTILINE) is not None


def pytest_xdist_make_scheduler(config, log):
    """What `pytest -n 2` hands out, and to whom."""
    return OncePretrained(config, log) if config.getoption("dist") == "loadfile" else None
