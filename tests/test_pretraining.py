"""The pre-training task on a random batch whose rows have every subset of modalities."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from opt_jax.models.inputs import Statistics, standardise
from opt_jax.models.opt import OPT, Sizes
from opt_jax.objectives.corruption import MODALITY, SAMPLE, TOKEN, Corruption, corrupt, rows_of
from opt_jax.partitioning import make_mesh, parameter_shardings, path_name, place_batch, unbox
from opt_jax.pretraining import noisy, pretraining_task
from opt_jax.step import microbatches

B, T, V, A, G = 32, 6, 3, 4, 5
CLS, SEP, MASK, W, CODES = 2, 3, 4, 16, 9
ROWS = (1, 2, 1)
SIZES = Sizes(
    vocab_size=W, region_size=4, audio_size=6, num_region_classes=5, num_codes=CODES, codes_per_image=G
)
CORRUPTION = Corruption(
    rows=ROWS, mask_probability=0.3, word_drop_probability=0.0, drop_probability=(0.3,) * 3,
    dropped_as_absent=0.5, placeholder_lengths=(4, 3, 2), sample_drop_probability=0.5,
    vocab_size=W, mask_id=MASK, sep_id=SEP, first_word_id=5,
)  # fmt: skip
STATISTICS = Statistics(np.ones(4, np.float32), np.full(4, 2, np.float32), np.zeros(6), np.ones(6))
QUICK = {"xla_backend_optimization_level": 0}  # compiles in half the time
NAMES = ("mlm", "mvfr", "mrc", "mafr", "macl", "dtr", "dir", "matching", "contrastive")
METRICS = {"dtr": "dtr_accuracy", "dir": "dir_accuracy", "matching": "matching_accuracy"}
SUBSETS = np.array([s for s in itertools.product([False, True], repeat=3) if any(s)])


def make_task(names=NAMES, num_alignment_layers=1, **changes):
    decoder = dict(num_layers=1, num_heads=2, mlp_size=8)
    config = dict(
        hidden_size=8, num_layers=2, num_heads=2, mlp_size=8, dropout=0.0, pre_norm=True,
        layer_norm_epsilon=1e-12, num_alignment_layers=num_alignment_layers, alignment_size=4,
        temperature_init=0.07, temperature_min=0.01, max_text_positions=T, max_audio_positions=A,
        frame_window=3, remat=False, unroll=1, dtype="float32", initializer_range=0.3,
        text_decoder=decoder, image_decoder=decoder,
    )  # fmt: skip
    objectives = ConfigDict(
        dict(
            macl_temperature=0.1,
            audio_noise=0.0,
            label_smoothing=0.1,
            hard_negative_fraction=0.5,
            hard_negative_temperature=0.1,
        )
    )
    objectives.weights = {name: float(name in names) for name in NAMES}
    return pretraining_task(OPT(config | changes, SIZES), STATISTICS, CORRUPTION, objectives)


def make_batch(seed=0):
    """Most rows have all three modalities. Whatever stands in absent or padded positions is garbage."""
    rng = np.random.default_rng(seed)
    present = np.where(np.arange(B)[:, None] % 3 > 0, True, SUBSETS[rng.integers(0, 7, B)])
    lengths = [rng.integers(3, T + 1, B), rng.integers(1, V + 1, B), rng.integers(1, A + 1, B)]
    lengths = np.where(present.T, lengths, np.array([1, 0, 0])[:, None])
    ids = rng.integers(5, W, (B, T))
    ids[present[:, 0], lengths[0][present[:, 0]] - 1] = SEP
    ids[:, 0] = CLS
    batch = {
        "text_ids": ids,
        "region_features": rng.normal(1, 2, (B, V, 4)).astype(np.float16),
        "region_boxes": rng.random((B, V, 7)).astype(np.float32),
        "region_classes": rng.integers(1, 6, (B, V)),
        "audio_features": rng.normal(size=(B, A, 6)).astype(np.float16),
        "image_codes": rng.integers(0, CODES, (B, G)),
        "present": present,
        "caption_key": np.arange(B) % 13,
    }
    for name, size, length in zip(("text", "region", "audio"), (T, V, A), lengths, strict=True):
        batch[f"{name}_valid"] = np.arange(size) < length[:, None]
    return batch


def draw_parameters(task, seed=1):
    rng = np.random.default_rng(seed)
    boxed = jax.eval_shape(lambda: task.init(jax.random.key(0), jax.tree.map(jnp.asarray, make_batch())))

    def draw(path, leaf):
        name = path_name(path)
        shift = -2.0 if name.endswith("log_temperature") else float(name.endswith("scale"))
        return jnp.asarray(rng.normal(size=leaf.shape) * 0.3 + shift, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, unbox(boxed))


@functools.lru_cache
def compiled(names=NAMES, num_alignment_layers=1):
    """(losses(params, corrupted batch), parameters) of a task."""
    task = make_task(names, num_alignment_layers)
    losses = jax.jit(
        lambda params, batch: task.losses(params, batch, jax.random.key(7), jnp.int32(0)),
        compiler_options=QUICK,
    )
    return losses, draw_parameters(task)


prepare = jax.jit(lambda batch: make_task().prepare(jax.random.key(6), batch), compiler_options=QUICK)


def losses_of(batch, **options):
    losses, params = compiled(**options)
    return jax.device_get(losses(params, batch))


def assert_same_losses(one, two, names=NAMES):
    for name in names:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-5, err_msg=name)


def test_every_loss_is_finite_and_counts_what_there_is():
    raw = make_batch()
    batch = jax.device_get(prepare(raw))
    out = losses_of(batch)
    assert set(out) == {*NAMES, *METRICS.values()}
    assert all(np.isfinite(pair).all() for pair in out.values())

    def count(mask, level):
        return rows_of(np.asarray(mask), level, ROWS).sum()

    present, length = raw["present"], raw["text_valid"].sum(1)
    clean = batch["clean"]
    several = raw["audio_valid"].sum(1, keepdims=True) > 1
    expected = {
        "mlm": count(batch["text_masked"], TOKEN),
        "mvfr": count(batch["region_masked"], TOKEN),
        "mrc": count(batch["region_masked"], TOKEN),
        "mafr": count(batch["audio_masked"], TOKEN),
        "macl": count(batch["audio_masked"] & several, TOKEN),
        "dtr": count((length - 1) * present[:, 0], MODALITY),
        "dir": count(present[:, 1], MODALITY) * G,
        "matching": count(batch["matching_defined"].any(1), SAMPLE),
        "contrastive": 2 * sum((clean[:, a] & clean[:, b]).sum() for a, b in ((0, 1), (0, 2), (1, 2))),
    }
    assert {name: out[name][1] for name in NAMES} == expected
    assert all(value > 0 for value in expected.values())


def test_nothing_of_an_absent_modality_or_of_padding_enters_a_loss():
    batch, other = make_batch(), make_batch(seed=1)
    spoiled = dict(batch)
    for prefix, fields in (
        ("text", ["text_ids"]),
        ("region", ["region_features", "region_boxes", "region_classes"]),
        ("audio", ["audio_features"]),
    ):
        valid = batch[f"{prefix}_valid"]
        for field in fields:
            keep = valid.reshape(valid.shape + (1,) * (batch[field].ndim - 2))
            spoiled[field] = np.where(keep, batch[field], other[field])
    spoiled["image_codes"] = np.where(batch["present"][:, 1:2], batch["image_codes"], other["image_codes"])
    assert sum(not np.array_equal(spoiled[name], batch[name]) for name in batch) == 6
    assert_same_losses(losses_of(prepare(batch)), losses_of(prepare(spoiled)))


def test_nothing_of_a_masked_position_enters_a_loss_but_as_its_target():
    batch = jax.device_get(prepare(make_batch()))
    other = make_batch(seed=1)
    spoiled = dict(batch)
    for prefix in ("region", "audio"):
        masked = batch[f"{prefix}_masked"][..., None]
        assert masked.any()
        field = f"{prefix}_features"
        spoiled[field] = np.where(masked, other[field], batch[field]).astype(np.float32)
    assert_same_losses(losses_of(batch), losses_of(spoiled))


@pytest.mark.parametrize("num_alignment_layers", [0, 1])
def test_reconstruction_sees_nothing_of_what_is_dropped(num_alignment_layers):
    options = dict(names=("dtr", "dir"), num_alignment_layers=num_alignment_layers)
    raw, other = make_batch(), make_batch(seed=1)
    batch = jax.device_get(prepare(raw))
    present = raw["present"]
    modality = (np.arange(B) % sum(ROWS) > 0) & (np.arange(B) % sum(ROWS) < 3)
    dropped = present & ~(batch["fused"] & batch["clean"]) & modality[:, None]  # as absence or as placeholder
    as_absence = (present & ~batch["fused"] & modality[:, None]).any(0)
    as_placeholder = (batch["fused"] & ~batch["clean"] & present & modality[:, None]).any(0)
    assert as_absence.all() and as_placeholder.all()

    def replaced(rows):
        """The raw batch with other content, of other lengths, in the given modalities [B, 3] of rows."""
        spoiled = dict(raw)
        for m, prefix in enumerate(("text", "region", "audio")):
            for field in raw:
                if field.startswith(prefix):
                    chosen = (rows & present & other["present"])[:, m]
                    spread = chosen.reshape((B,) + (1,) * (raw[field].ndim - 1))
                    spoiled[field] = np.where(spread, other[field], raw[field])
        out = jax.device_get(prepare(spoiled))
        asked = ("text_targets", "text_history", "text_length", "image_codes")
        return out | {field: batch[field] for field in asked}

    before = losses_of(batch, **options)
    assert_same_losses(before, losses_of(replaced(dropped), **options), ("dtr", "dir"))
    kept = present & ~dropped & modality[:, None]
    after = losses_of(replaced(kept), **options)
    assert all(abs(after[name][0] / before[name][0] - 1) > 1e-4 for name in ("dtr", "dir"))


@pytest.mark.parametrize("left_out", NAMES)
def test_an_objective_of_weight_zero_is_not_there(left_out):
    names = tuple(name for name in NAMES if name != left_out)
    task = make_task(names)
    assert set(task.weights) == set(names)
    batch = jax.eval_shape(prepare, make_batch())
    out = jax.eval_shape(task.losses, compiled()[1], batch, jax.random.key(0), jnp.int32(0))
    assert set(out) == {*names, *(METRICS[name] for name in names if name in METRICS)}


@pytest.mark.parametrize(
    ("names", "unused"),
    [
        (NAMES, ""),
        (
            ("mlm", "dir"),
            "log_temperature text_decoder heads/region heads/class heads/frame heads/matching",
        ),
    ],
)
def test_gradients_are_finite_and_reach_what_the_objectives_use(names, unused):
    losses, params = compiled(names)
    # Biases are zero at the start, and with them what an absent modality is embedded as.
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * (not path_name(path).endswith("bias")), params
    )
    batch = prepare(make_batch())

    def total(params):
        out = losses.__wrapped__(params, batch)
        return sum(out[name][0] for name in names)

    gradients = jax.jit(jax.grad(total), compiler_options=QUICK)(params)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        name = path_name(path)
        assert np.isfinite(gradient).all(), name
        of_unused = any(part in name for part in unused.split())
        assert bool(np.abs(gradient).max() > 0) != of_unused, name


def test_noise_is_on_what_the_model_hears_and_not_on_its_targets():
    batch = {key: jnp.asarray(value) for key, value in make_batch().items()}
    plain = corrupt(jax.random.key(1), standardise(batch, STATISTICS), CORRUPTION)
    assert noisy(jax.random.key(2), plain, 0.0) is plain
    heard = noisy(jax.random.key(2), plain, 0.5)
    added = np.asarray(heard["audio_features"] - plain["audio_features"])
    valid = np.asarray(plain["audio_valid"])
    assert not added[~valid].any() and 0.4 < added[valid].std() < 0.6 and abs(added[valid].mean()) < 0.1
    for name in plain.keys() - {"audio_features"}:
        np.testing.assert_array_equal(heard[name], plain[name], err_msg=name)


def test_dropout_is_for_training_only():
    task = make_task(("mlm",), dropout=0.5)
    batch, params = prepare(make_batch()), draw_parameters(make_task())

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(key):
        arguments = (params, batch, jax.random.key(key), jnp.int32(0))
        return task.losses(*arguments)["mlm"][0], task.evaluate_losses(*arguments)["mlm"][0]

    (one, one_without), (two, two_without) = run(0), run(1)
    assert one != two and one_without == two_without
    np.testing.assert_allclose(one_without, losses_of(batch)["mlm"][0], rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_losses_leave_the_model_in_float32(dtype):
    task = make_task(dtype=dtype)
    batch, params = jax.eval_shape(prepare, make_batch()), jax.eval_shape(lambda: compiled()[1])
    out = jax.eval_shape(task.losses, params, batch, jax.random.key(0), jnp.int32(0))
    assert {x.dtype for pair in out.values() for x in pair} == {jnp.dtype("float32")}


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
def test_corruption_and_losses_are_the_same_on_every_mesh(sizes):
    task, (_, params) = make_task(), compiled()
    raw = make_batch()
    mesh = make_mesh(dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
    boxed = jax.eval_shape(lambda: task.init(jax.random.key(0), jax.tree.map(jnp.asarray, raw)))
    places = parameter_shardings(mesh, boxed)
    assert any(not place.is_fully_replicated for place in jax.tree.leaves(places)) == (sizes[1] > 1)

    def run(params, batch):
        return task.losses(params, task.prepare(jax.random.key(6), batch), jax.random.key(7), jnp.int32(0))

    with jax.set_mesh(mesh):
        found = jax.jit(run, compiler_options=QUICK)(jax.device_put(params, places), place_batch(mesh, raw))
    assert_same_losses(losses_of(prepare(raw)), jax.device_get(found))


def test_losses_within_rows_of_microbatches_add_up():
    batch = prepare(make_batch())
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1})
    parts = jax.jit(lambda batch: microbatches(batch, 2, make_task().rows_per_group, mesh))(batch)
    whole, one, two = (
        losses_of(b) for b in (batch, *(jax.tree.map(lambda x, m=m: x[m], parts) for m in (0, 1)))
    )
    for name in ("mlm", "mvfr", "mrc", "mafr", "macl", "dtr", "dir"):
        np.testing.assert_allclose(np.add(one[name], two[name]), whole[name], rtol=1e-5, err_msg=name)
    assert one["matching"][1] + two["matching"][1] == whole["matching"][1]


def test_microbatches_are_dealt_whole_groups():
    mesh = make_mesh({"data": 2, "fsdp": 1, "tensor": 1})
    batch = place_batch(mesh, {"x": np.arange(24)})
    groups = jax.jit(lambda batch: microbatches(batch, 2, 3, mesh))(batch)["x"]
    np.testing.assert_array_equal(
        groups, [[0, 1, 2, 6, 7, 8, 12, 13, 14, 18, 19, 20], [3, 4, 5, 9, 10, 11, 15, 16, 17, 21, 22, 23]]
    )
    with pytest.raises(ValueError, match="x: 24 rows do not make 2 microbatches of whole groups of 5"):
        microbatches({"x": jnp.zeros(24)}, 2, 5, mesh)
