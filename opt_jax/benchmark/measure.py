"""What the benchmark times (this project's step on a synthetic batch, a matrix product), and the timing."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from statistics import median
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from opt_jax.models.inputs import Statistics
from opt_jax.models.opt import OPT, Sizes
from opt_jax.objectives.corruption import SAMPLE, rows_of
from opt_jax.objectives.matching import draw_donors
from opt_jax.optimizer import make_optimizer, weight_decay_mask
from opt_jax.partitioning import make_mesh, place_batch, replicated, unbox
from opt_jax.pretraining import corruption_settings, pretraining_task
from opt_jax.state import fresh, shardings
from opt_jax.step import Task, make_step


def synthetic_batch(sizes: Sizes, batch: int, lengths: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """A batch as the loader gives it, with all modalities and all (T, V, A) positions; random values."""
    rng = np.random.default_rng(0)
    t, v, a = lengths
    return {
        "text_ids": rng.integers(5, sizes.vocab_size, (batch, t), np.int32),
        "text_valid": np.ones((batch, t), bool),
        "region_features": rng.normal(size=(batch, v, sizes.region_size)).astype(np.float16),
        "region_boxes": rng.random((batch, v, 7), np.float32),
        "region_classes": rng.integers(1, sizes.num_region_classes + 1, (batch, v), np.int32),
        "region_valid": np.ones((batch, v), bool),
        "audio_features": rng.normal(size=(batch, a, sizes.audio_size)).astype(np.float16),
        "audio_valid": np.ones((batch, a), bool),
        "image_codes": rng.integers(0, sizes.num_codes, (batch, sizes.codes_per_image), np.int32),
        "present": np.ones((batch, 3), bool),
        "caption_key": np.arange(batch, dtype=np.int32),
        "row_valid": np.ones(batch, bool),
    }


def make_task(config, sizes: Sizes, lengths: tuple[int, int, int]) -> Task:
    """The pre-training task of a whole configuration, for standardised data of these sizes.

    Placeholders longer than the (T, V, A) positions of the batch are cut, [CLS] being none of the text's.
    """
    words = SimpleNamespace(vocab_size=sizes.vocab_size, mask_id=4, sep_id=3)
    corruption = corruption_settings(config, words)
    room = (lengths[0] - 1, *lengths[1:])
    cut = tuple(map(min, corruption.placeholder_lengths, room))
    corruption = dataclasses.replace(corruption, placeholder_lengths=cut)
    zero_one = (np.zeros(1, np.float32), np.ones(1, np.float32))
    model = OPT(config.model.to_dict(), sizes)
    return pretraining_task(model, Statistics(*zero_one, *zero_one), corruption, config.objectives)


def corrupted(task: Task, batch: Mapping, rows, seed: int = 0):
    """(corrupted batch, donors, found) as arrays, for the side that does not corrupt by itself."""
    key = jax.random.key(seed)
    batch = jax.jit(task.prepare)(key, batch)
    replaced, own = (rows_of(batch[name], SAMPLE, rows) for name in ("replaced", "caption_key"))
    donors, found = draw_donors(key, replaced, batch["clean"], (own, batch["caption_key"]), None, 0.0)
    return jax.device_get((batch, donors, found))


class Step:
    """This project's train step on one device, with its state; a call runs one and returns the total loss."""

    def __init__(self, task: Task, config, batch: Mapping, seed: int = 0):
        mesh = make_mesh(dict(data=1, fsdp=1, tensor=1))
        self.batch = place_batch(mesh, batch)

        def init():
            return task.init(jax.random.key(seed), self.batch)

        boxed = jax.eval_shape(init)
        optimizer = make_optimizer(config, weight_decay_mask(boxed))
        places = shardings(mesh, boxed, optimizer, config.precision)
        create = jax.jit(lambda: fresh(unbox(init()), optimizer, config.precision), out_shardings=places)
        step = make_step(task, config, optimizer, seed, mesh)
        self.step = jax.jit(step, donate_argnums=0, out_shardings=(places, replicated(mesh)))
        self.state = create()

    def __call__(self) -> float:
        self.state, measures = self.step(self.state, self.batch)
        jax.block_until_ready(self.state.params)
        return float(measures["total"])

    def num_parameters(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.state.params))


def matrix_product(size: int, dtype=jnp.float32) -> Callable[[], None]:
    """A call that computes one product of two [size, size] matrices: 2 size^3 operations."""
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (size, size), dtype) for key in keys)
    product = jax.jit(jnp.matmul)
    return lambda: jax.block_until_ready(product(a, b))


def interleaved(calls: Mapping[str, Callable], repetitions: int) -> dict[str, list[float]]:
    """Seconds of each call, measured in turn `repetitions` times after two rounds to compile and warm up."""
    for call in calls.values():
        call()
        call()
    seconds = {name: [] for name in calls}
    for _ in range(repetitions):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def middle(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: median(values) for name, values in seconds.items()}
