"""What corruption draws, and what it must never touch or show."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opt_jax.objectives.corruption import (
    MODALITY,
    SAMPLE,
    TOKEN,
    Corruption,
    corrupt,
    draw_dropped,
    draw_matching,
    rows_of,
    with_rows,
)
from opt_jax.partitioning import make_mesh, place_batch

B, T, V, A = 4096, 9, 5, 7
CLS, SEP, MASK, WORDS = 2, 3, 4, 12
SETTINGS = Corruption(
    rows=(1, 2, 1), mask_probability=0.2, word_drop_probability=0.25, drop_probability=(0.2, 0.3, 0.5),
    dropped_as_absent=0.4, placeholder_lengths=(6, 3, 4), sample_drop_probability=0.5,
    vocab_size=5 + WORDS, mask_id=MASK, sep_id=SEP, first_word_id=5,
)  # fmt: skip
SUBSETS = np.array([s for s in itertools.product([False, True], repeat=3) if any(s)])
PREFIXES = ("text", "region", "audio")


def make_batch(seed=0, size=B, present=None):
    """Rows of every length and of every subset of modalities; half of them have all three."""
    rng = np.random.default_rng(seed)
    if present is None:
        present = np.where(rng.random((size, 1)) < 0.5, True, SUBSETS[rng.integers(0, 7, size)])
    # [CLS], 1 to T - 2 words, [SEP]; 1 to V regions; 1 to A frames
    length = np.stack(
        [rng.integers(3, T + 1, size), rng.integers(1, V + 1, size), rng.integers(1, A + 1, size)]
    )
    length = np.where(present.T, length, np.array([1, 0, 0])[:, None])
    valid = [np.arange(n) < k[:, None] for n, k in zip((T, V, A), length, strict=True)]
    ids = np.where(valid[0], rng.integers(5, 5 + WORDS, (size, T)), 0)
    ids = np.where((np.arange(T) == length[0][:, None] - 1) & present[:, :1], SEP, ids)
    ids[:, 0] = CLS
    regions, frames = (rng.normal(size=(size, n, 2)).astype(np.float32) for n in (V, A))
    return {
        "text_ids": ids.astype(np.int32),
        "text_valid": valid[0],
        "region_features": regions * valid[1][..., None],
        "region_boxes": rng.random((size, V, 7)).astype(np.float32) * valid[1][..., None],
        "region_valid": valid[1],
        "audio_features": frames * valid[2][..., None],
        "audio_valid": valid[2],
        "present": present,
        "caption_key": rng.integers(0, 1000, size).astype(np.int32),
    }


corrupted = jax.jit(lambda key, batch: corrupt(key, batch, SETTINGS))


@functools.lru_cache
def drawn():
    """A batch, and what became of it."""
    batch = make_batch()
    return batch, jax.device_get(corrupted(jax.random.key(0), batch))


def level_of(size=B):
    return np.tile([TOKEN, MODALITY, MODALITY, SAMPLE], size // 4)


def near(found, expected, number):
    """A frequency within four standard errors."""
    assert abs(found - expected) < 4 * np.sqrt(expected * (1 - expected) / number) + 1e-9, (found, expected)


def test_rows_are_dealt_exactly():
    x, rows = np.arange(24).reshape(12, 2), (1, 3, 2)
    np.testing.assert_array_equal(rows_of(x, TOKEN, rows)[:, 0] // 2, [0, 6])
    np.testing.assert_array_equal(rows_of(x, MODALITY, rows)[:, 0] // 2, [1, 2, 3, 7, 8, 9])
    np.testing.assert_array_equal(rows_of(x, SAMPLE, rows)[:, 0] // 2, [4, 5, 10, 11])
    back = with_rows(jnp.asarray(x), -rows_of(jnp.asarray(x), SAMPLE, rows), SAMPLE, rows)
    np.testing.assert_array_equal(back, np.where(np.isin(np.arange(12), [4, 5, 10, 11])[:, None], -x, x))


def test_each_level_does_its_own_and_nothing_else():
    batch, out = drawn()
    level = level_of()
    shown = out["clean"] != batch["present"]  # token masks or a placeholder
    masks = np.stack([out[f"{name}_masked"].any(1) for name in PREFIXES])
    assert not masks[:, level == SAMPLE].any() and not shown[level == SAMPLE].any()
    for field in ("replaced", "matching_defined", "matching_label"):
        assert not out[field][level != SAMPLE].any() and out[field][level == SAMPLE].any()
    assert (out["fused"] == batch["present"])[level == TOKEN].all()
    unchanged = level == SAMPLE
    for field in ("text_ids", "region_features", "region_boxes", "audio_features", "text_valid"):
        np.testing.assert_array_equal(out[field][unchanged], batch[field][unchanged])


def test_targets_are_the_inputs_as_they_were():
    batch, out = drawn()
    for name, field in (("text", "text_ids"), ("region", "region_features"), ("audio", "audio_features")):
        np.testing.assert_array_equal(out[f"{name}_targets"], batch[field])
    np.testing.assert_array_equal(out["text_length"], batch["text_valid"].sum(1))


def test_token_masks_hit_one_present_modality_at_the_rate_asked_for():
    batch, out = drawn()
    token = level_of() == TOKEN
    hit = np.stack([out[f"{name}_masked"].any(1) for name in PREFIXES], 1)[token]
    present = batch["present"][token]
    assert (hit.sum(1) == 1).all() and not (hit & ~present).any()
    np.testing.assert_array_equal(out["clean"][token], present & ~hit)
    full = present.all(1)
    for m in range(3):
        near(hit[full, m].mean(), 1 / 3, full.sum())
    words = batch["text_valid"] & (np.arange(T) > 0) & (batch["text_ids"] != SEP)
    for m, candidates in enumerate((words, batch["region_valid"], batch["audio_valid"])):
        masked = out[f"{PREFIXES[m]}_masked"][token]
        candidates = candidates[token]
        assert not (masked & ~candidates).any()
        number, p = candidates[hit[:, m]].sum(1), SETTINGS.mask_probability
        expected = (number * p + (1 - p) ** number).sum()  # at least one in each row
        assert abs(masked.sum() - expected) < 4 * np.sqrt(number.sum() * p * (1 - p))


def test_words_are_dropped_from_what_the_decoder_reads():
    batch, out = drawn()
    words = batch["text_valid"] & (np.arange(T) > 0) & (batch["text_ids"] != SEP)
    dropped = out["text_history"] != batch["text_ids"]
    assert (out["text_history"][dropped] == MASK).all() and not (dropped & ~words).any()
    near(dropped[words].mean(), 0.25, words.sum())


def test_masked_words_follow_bert():
    batch, out = drawn()
    token = level_of() == TOKEN
    masked = out["text_masked"][token]
    before, after = batch["text_ids"][token], out["text_ids"][token]
    np.testing.assert_array_equal(before[~masked], after[~masked])
    number = masked.sum()
    near((after[masked] == MASK).mean(), 0.8, number)
    near((after[masked] == before[masked]).mean(), 0.1 + 0.1 / WORDS, number)
    others = after[masked & (after != MASK) & (after != before)]
    assert set(others.tolist()) == set(range(5, 5 + WORDS))


def test_cls_is_never_masked_and_always_valid():
    _, out = drawn()
    assert (out["text_ids"][:, 0] == CLS).all() and out["text_valid"][:, 0].all()
    assert not out["text_masked"][:, 0].any()


def test_what_is_dropped_is_some_of_what_is_present():
    p = np.array(SETTINGS.drop_probability)
    for present in SUBSETS:
        rows = jnp.broadcast_to(jnp.asarray(present), (4000, 3))
        dropped = np.asarray(jax.jit(draw_dropped, static_argnums=2)(jax.random.key(1), rows, tuple(p)))
        assert not (dropped & ~present).any()
        if present.sum() == 1:
            assert not dropped.any()
            continue
        assert dropped.any(1).all() and (dropped != present).any(1).all()
        weight = {}
        for subset in itertools.product([False, True], repeat=3):
            proper = any(subset) and subset != tuple(present) and not (np.array(subset) & ~present).any()
            weight[subset] = proper * np.prod(np.where(subset, p, 1 - p)[present])
        for subset, w in weight.items():
            near((dropped == subset).all(1).mean(), w / sum(weight.values()), 4000)


def test_a_dropped_modality_is_absent_or_a_run_of_masks_of_constant_length():
    batch, out = drawn()
    level, present = level_of()[:, None], batch["present"]
    absent = present & ~out["fused"] & (level == MODALITY)
    shown = present & ~out["clean"] & (level == MODALITY)
    assert not (absent & shown).any() and not (out["fused"] & ~present).any()
    number = (absent | shown).sum()
    near(absent.sum() / number, SETTINGS.dropped_as_absent, number)
    np.testing.assert_array_equal((absent | shown).any(1), (level[:, 0] == MODALITY) & (present.sum(1) > 1))
    for m, (name, size) in enumerate(zip(PREFIXES, (T, V, A), strict=True)):
        run = np.arange(size) < SETTINGS.placeholder_lengths[m] + (m == 0)
        np.testing.assert_array_equal(
            out[f"{name}_valid"], np.where(shown[:, m, None], run, batch[f"{name}_valid"])
        )
        if m:
            assert (out[f"{name}_masked"][shown[:, m]] == run).all()
    expected = [CLS] + [MASK] * 6 + [0] * (T - 7)
    assert (out["text_ids"][shown[:, 0]] == expected).all()
    assert (out["region_boxes"][shown[:, 1]] == [0, 0, 1, 1, 1, 1, 1]).all()


def test_a_placeholder_longer_than_the_batch_is_refused():
    """Cut to the batch's length it would tell how long the longest row is."""
    batch = make_batch(size=8)
    for lengths, message in (((T, 3, 4), "text"), ((6, V + 1, 4), "image"), ((6, 3, A + 1), "audio")):
        settings = dataclasses.replace(SETTINGS, placeholder_lengths=lengths)
        with pytest.raises(ValueError, match=f"placeholder.*{message}"):
            corrupt(jax.random.key(0), batch, settings)


def test_a_batch_of_broken_groups_is_refused():
    with pytest.raises(ValueError, match="10 rows .* groups of 4"):
        corrupt(jax.random.key(0), make_batch(size=10), SETTINGS)


def test_eight_devices_draw_the_same_bits():
    batch, out = drawn()
    mesh = make_mesh({"data": 4, "fsdp": 2, "tensor": 1})
    spread = corrupted(jax.random.key(0), place_batch(mesh, batch))
    for name, value in out.items():
        np.testing.assert_array_equal(spread[name], value, err_msg=name)
    assert any(len(value.sharding.device_set) == 8 for value in spread.values())


# For the modalities (text, image, audio) that are left: the classes that may be asked for, and for each class
# the sets of modalities that may be replaced.
T_, I_, A_ = (True, False, False), (False, True, False), (False, False, True)
NONE, TI, TA, IA = (False,) * 3, (True, True, False), (True, False, True), (False, True, True)
MATCHING = {
    (True, True, True): {0: {NONE}, 1: {T_}, 2: {I_}, 3: {A_}, 4: {TI, TA, IA}},
    TI: {3: {NONE}, 4: {T_, I_}},
    TA: {2: {NONE}, 4: {T_, A_}},
    IA: {1: {NONE}, 4: {I_, A_}},
    T_: {},
    I_: {},
    A_: {},
}


@pytest.mark.parametrize("loses", [0.0, 0.5])
def test_matching_asks_for_the_classes_that_are_defined(loses):
    present = np.repeat(SUBSETS, 1500, axis=0)
    draws = jax.jit(draw_matching, static_argnums=2)(jax.random.key(2), present, loses)
    lost, label, defined, replaced = jax.device_get(draws)
    assert (lost.sum(1) <= 1).all() and not lost[present.sum(1) < 3].any()
    full = present.all(1)
    near(lost[full].any(1).mean(), loses, full.sum())
    left = present & ~lost
    for subset, classes in MATCHING.items():
        rows = (left == subset).all(1)
        if not rows.any():
            continue
        assert (defined[rows] == np.isin(np.arange(5), list(classes))).all()
        for c, sets in classes.items():
            near((label[rows] == c).mean(), 1 / len(classes), rows.sum())
            assert {tuple(r) for r in replaced[rows & (label == c)].tolist()} == sets
        if not classes:
            assert not replaced[rows].any()
    if loses:
        assert (lost[full].sum(0) > full.sum() / 8).all()  # each modality is lost in a sixth of the rows
