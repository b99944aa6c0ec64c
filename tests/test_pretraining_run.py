"""Pre-training through the loop, the loader and a tiny cache, on meshes of simulated devices."""

import dataclasses
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from tiny_cache import SCHEMA, TinyExtractor, TinySource

from opt_jax.cache import FeatureCache, build_cache
from opt_jax.data.loader import Loader, LoaderConfig
from opt_jax.metrics_log import MetricsLog, read_metrics
from opt_jax.models.inputs import Statistics
from opt_jax.models.opt import OPT, Sizes
from opt_jax.objectives.corruption import Corruption
from opt_jax.partitioning import is_boxed, path_name
from opt_jax.pretraining import pretraining_task
from opt_jax.train import train

pytestmark = pytest.mark.slow  # each case compiles a training step, which takes a minute
B, STACK = 16, 2
WITHIN_ROWS = ("mlm", "mvfr", "mrc", "mafr", "macl", "dtr", "dir")  # a row's loss needs no other row


def make_task(cache, dropout):
    sizes = Sizes(
        vocab_size=16,
        region_size=4,
        audio_size=3 * STACK,
        num_region_classes=4,
        num_codes=64,
        codes_per_image=4,
    )
    decoder = dict(num_layers=1, num_heads=2, mlp_size=8)
    config = dict(
        hidden_size=8, num_layers=2, num_heads=2, mlp_size=8, dropout=dropout, pre_norm=True,
        layer_norm_epsilon=1e-12, num_alignment_layers=1, alignment_size=4, temperature_init=0.07,
        temperature_min=0.01, max_text_positions=5, max_audio_positions=3, frame_window=3,
        remat=False, unroll=1,
        dtype="float32", initializer_range=0.3, text_decoder=decoder, image_decoder=decoder,
    )  # fmt: skip
    corruption = Corruption(
        rows=(1, 2, 1), mask_probability=0.3, word_drop_probability=0.0, drop_probability=(0.3,) * 3,
        dropped_as_absent=0.5, placeholder_lengths=(4, 2, 2), sample_drop_probability=0.5,
        vocab_size=16, mask_id=4, sep_id=3, first_word_id=5,
    )  # fmt: skip
    statistics = Statistics(
        region_mean=cache.region_mean,
        region_deviation=cache.region_deviation,
        audio_mean=np.tile(cache.audio_mean, STACK),
        audio_deviation=np.tile(cache.audio_deviation, STACK),
    )
    objectives = ConfigDict(dict(macl_temperature=0.1, label_smoothing=0.0, hard_negative_temperature=0.1))
    objectives.audio_noise = 0.0
    objectives.hard_negative_fraction = 0.5
    objectives.weights = dict.fromkeys((*WITHIN_ROWS, "matching", "contrastive"), 1.0)
    task = pretraining_task(OPT(config, sizes), statistics, corruption, objectives)

    def init(key, batch):
        """Parameters with the model's axis names, but values that need little compiling."""

        def fill(path, box):
            number = jnp.arange(box.value.size, dtype=jnp.float32).reshape(box.value.shape)
            shift = {"scale": 1.0, "log_temperature": -2.0}.get(path_name(path).split("/")[-1], 0.0)
            return box.replace_boxed(0.3 * jnp.sin(1 + 12.9898 * number) + shift)

        boxed = jax.eval_shape(task.init, key, batch)
        return jax.tree_util.tree_map_with_path(fill, boxed, is_leaf=is_boxed)

    return dataclasses.replace(task, init=init)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cache")
    source = TinySource(48)
    build_cache(source, TinyExtractor(), directory, {}, split="train", schema=SCHEMA, examples_per_shard=16)
    return FeatureCache(directory)


def run(cache, workdir, mesh=(1, 1, 1), dropout=0.1, **fields):
    """Two epochs and a bit, with all that makes a step depend on which one it is."""
    options = LoaderConfig(
        batch_size=B, buckets=((5, 3),), audio_stack=STACK, max_regions=2, seed=3, threads=0
    )
    loader = Loader(cache, options)
    assert loader.steps_per_epoch == 3
    settings = dict(steps=7, batch_size=B, learning_rate=1e-2, warmup_steps=2, decay="cosine", log_every=1)
    settings["mesh"] = dict(zip(("data", "fsdp", "tensor"), mesh, strict=True))
    config = ConfigDict(settings | fields)
    params = train(make_task(cache, dropout), loader, config, workdir, name="run", seed=5, fingerprint={})
    return params, lines(workdir)


def lines(workdir):
    return [line for line in read_metrics(workdir / "metrics.jsonl") if "total" in line]


@pytest.fixture(scope="module")
def reference(cache, tmp_path_factory):
    params, logged = run(cache, tmp_path_factory.mktemp("reference"))
    assert len(logged) == 7 and all(line["skipped"] == 0 for line in logged)
    return jax.device_get(params), logged


def assert_close(found, wanted, names, tolerance):
    """A loss that counted nothing is None in both."""
    values = [np.array([line[name] for name in names], float) for line in (found, wanted)]
    np.testing.assert_allclose(*values, rtol=tolerance, atol=1e-6, err_msg=str(names))
    assert np.isfinite(values[0]).sum() >= len(names) - 2


@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 2, 2)])
def test_meshes_give_the_same_losses(cache, tmp_path, reference, mesh):
    params, logged = run(cache, tmp_path, mesh)
    for found, wanted in zip(logged, reference[1], strict=True):
        names = (*WITHIN_ROWS, "matching", "contrastive", "total", "dtr_accuracy")
        assert_close(found, wanted, names, 1e-4)
    if mesh == (2, 2, 2):
        qkv = params["encoder"]["layers"]["qkv"]["kernel"]
        assert qkv.sharding.shard_shape(qkv.shape) == (2, 4, 3, 1, 4)


def test_an_interrupted_run_ends_with_the_same_bits(cache, tmp_path, monkeypatch, reference):
    write = MetricsLog.write

    def stop(self, step, values):
        write(self, step, values)
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(MetricsLog, "write", stop)
    with pytest.raises(SystemExit):
        run(cache, tmp_path)
    monkeypatch.undo()
    assert len(lines(tmp_path)) == 5  # in the middle of the second epoch
    params, logged = run(cache, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), reference[0])
    names = (*WITHIN_ROWS, "matching", "contrastive", "total", "learning_rate", "gradient_norm")
    assert [[line[name] for name in names] for line in logged] == [
        [line[name] for name in names] for line in reference[1]
    ]


def test_accumulation_gives_the_same_losses_within_rows(cache, tmp_path):
    (whole,), (parts,) = (
        run(cache, tmp_path / str(n), dropout=0.0, steps=1, decay="constant", accumulation=n)[1]
        for n in (1, 2)
    )
    assert_close(parts, whole, WITHIN_ROWS, 1e-5)
