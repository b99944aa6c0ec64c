"""Properties of the model that hold for any weights: what may influence what, and decoding step by step."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opt_jax.models.generation import generate_image_codes, generate_text, keep_likely, sample
from opt_jax.models.inputs import uncorrupted
from opt_jax.models.opt import OPT, Sizes
from opt_jax.partitioning import path_name, unbox

B, T, V, A, G = 3, 7, 4, 6, 5
SIZES = Sizes(
    vocab_size=23, region_size=8, audio_size=6, num_region_classes=5, num_codes=11, codes_per_image=G
)


def config(**changes):
    decoder = dict(num_layers=2, num_heads=2, mlp_size=32)
    model = dict(
        hidden_size=16, num_layers=3, num_heads=4, mlp_size=32, dropout=0.1, pre_norm=False,
        layer_norm_epsilon=1e-12, num_alignment_layers=1, alignment_size=8, temperature_init=0.07,
        temperature_min=0.01, max_text_positions=T, max_audio_positions=A, frame_window=3,
        remat=False, unroll=1,
        dtype="float32", initializer_range=0.3, text_decoder=decoder, image_decoder=decoder,
    )  # fmt: skip
    return model | changes


def make_batch(seed=0):
    rng = np.random.default_rng(seed)
    lengths = {"text": [7, 4, 5], "region": [4, 2, 3], "audio": [3, 6, 5]}
    valid = {
        name: np.arange(size)[None] < np.array(lengths[name])[:, None]
        for name, size in (("text", T), ("region", V), ("audio", A))
    }
    batch = {
        "text_ids": rng.integers(5, 23, (B, T)),
        "text_valid": valid["text"],
        "region_features": rng.normal(size=(B, V, 8)).astype(np.float32),
        "region_boxes": rng.random((B, V, 7)).astype(np.float32),
        "region_valid": valid["region"],
        "audio_features": rng.normal(size=(B, A, 6)).astype(np.float32),
        "audio_valid": valid["audio"],
        "image_codes": rng.integers(0, 11, (B, G)),
    }
    return {name: jnp.asarray(x) for name, x in batch.items()}


@functools.lru_cache
def make(pre_norm, sizes=SIZES):
    """A model and its parameters, drawn in numpy: biases and norms matter, and no init has to be compiled."""
    model, codes = OPT(config(pre_norm=pre_norm), sizes), jnp.zeros((B, sizes.codes_per_image), int)
    init = functools.partial(model.init, jax.random.key(0), uncorrupted(make_batch()), codes)
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        values = rng.normal(size=leaf.shape) * 0.3 + path_name(path).endswith("scale")
        return jnp.asarray(values, leaf.dtype)

    return model, jax.tree_util.tree_map_with_path(draw, unbox(jax.eval_shape(init)["params"]))


@pytest.fixture(params=[False, True], ids=["post-norm", "pre-norm"])
def opt(request):
    return make(request.param)


@functools.lru_cache
def compiled(model, method, statics):
    """A method of a model under jit; `statics` are (position, value) of arguments that are no arrays."""

    def run(params, *arrays):
        arrays = list(arrays)
        for place, value in statics:
            arrays.insert(place, value)
        return model.apply({"params": params}, *arrays, method=method)

    return jax.jit(run)


def is_static(x):
    return isinstance(x, str | int | type) or (isinstance(x, tuple) and isinstance(x[0], int))


def apply(opt, method, *args):
    model, params = opt
    statics = tuple((place, x) for place, x in enumerate(args) if is_static(x))
    return compiled(model, method, statics)(params, *(x for x in args if not is_static(x)))


def test_padding_never_changes_a_real_position(opt):
    batch, spoiled = make_batch(), make_batch()
    for name in ("region_features", "region_boxes", "audio_features"):
        valid = spoiled[f"{name.split('_')[0]}_valid"]
        spoiled[name] = np.where(valid[..., None], spoiled[name], 1e3).astype(np.float32)
    spoiled["text_ids"] = np.where(spoiled["text_valid"], spoiled["text_ids"], 22)
    memory, valid = apply(opt, "encode", uncorrupted(batch))
    other, _ = apply(opt, "encode", uncorrupted(spoiled))
    np.testing.assert_allclose(memory[valid], other[valid], atol=1e-5)
    assert not np.allclose(memory[~valid], other[~valid], atol=1e-2)


def test_an_absent_modality_is_as_if_it_had_no_positions(opt):
    inputs = uncorrupted(make_batch(), (False, False, True))
    memory, valid = apply(opt, "encode", inputs)
    cut = {
        name: x if name.startswith("audio") else x[:, : name.startswith("text")] for name, x in inputs.items()
    }
    short, short_valid = apply(opt, "encode", cut)
    np.testing.assert_allclose(memory[valid], short[short_valid], atol=1e-5)


@pytest.mark.parametrize("keep", list(itertools.product([False, True], repeat=3)))
def test_the_content_of_an_absent_modality_is_never_seen(opt, keep):
    memory, valid = apply(opt, "encode", uncorrupted(make_batch(), keep))
    assert np.isfinite(memory).all()
    other = make_batch(seed=1)
    batch = make_batch() | {
        name: x
        for name, x in other.items()
        if name != "image_codes" and not name.endswith("valid") and not keep["tra".index(name[0])]
    }
    batch["text_ids"] = batch["text_ids"].at[:, 0].set(make_batch()["text_ids"][:, 0])  # [CLS] is always seen
    changed, _ = apply(opt, "encode", uncorrupted(batch, keep))
    np.testing.assert_allclose(memory[valid], changed[valid], atol=1e-6)


def test_alignment_stays_within_a_modality_and_fusion_does_not(opt):
    batch, other = make_batch(), make_batch()
    other["audio_features"] = other["audio_features"] + 1
    (states, valid), (changed, _) = (apply(opt, "align", uncorrupted(b)) for b in (batch, other))
    np.testing.assert_allclose(states[:, : T + V], changed[:, : T + V], atol=1e-6)
    assert not np.allclose(states[:, T + V :], changed[:, T + V :], atol=1e-2)
    fused, fused_changed = (apply(opt, "fuse", s, valid, (T, V, A)) for s in (states, changed))
    assert not np.allclose(fused[:, 0], fused_changed[:, 0], atol=1e-3)


def test_embeddings_have_unit_length(opt):
    states, valid = apply(opt, "align", uncorrupted(make_batch()))
    for embedding in apply(opt, "embeddings", states, valid, (T, V, A)).values():
        np.testing.assert_allclose(np.linalg.norm(embedding, axis=-1), 1, atol=1e-5)


@pytest.mark.parametrize("what, symbols", [("text", 23), ("image", 11)])
def test_cached_decoding_equals_teacher_forcing(opt, what, symbols):
    memory, valid = apply(opt, "encode", uncorrupted(make_batch()))
    memory_kv = apply(opt, f"{what}_memory", memory)
    sequence = np.random.default_rng(3).integers(0, symbols, (B, G))
    forced = apply(opt, f"{what}_logits", sequence, memory_kv, valid)
    cache = apply(opt, "empty_cache", what, B, G, jnp.float32)
    for position in range(G):
        before = jnp.asarray(sequence[:, position - 1])  # at position 0 whatever stands there is ignored
        logits, cache = apply(opt, f"{what}_step", before, jnp.int32(position), cache, memory_kv, valid)
        np.testing.assert_allclose(logits, forced[:, position], atol=2e-5)


def test_decoder_sees_no_later_symbol(opt):
    memory, valid = apply(opt, "encode", uncorrupted(make_batch()))
    memory_kv = apply(opt, "text_memory", memory)
    one = np.random.default_rng(3).integers(0, 23, (B, G))
    other = one.copy()
    other[:, 2] = (one[:, 2] + 1) % 23
    a, b = (apply(opt, "text_logits", x, memory_kv, valid) for x in (one, other))
    np.testing.assert_allclose(a[:, :3], b[:, :3], atol=1e-6)
    assert not np.allclose(a[:, 3], b[:, 3], atol=1e-3)


def test_a_shared_memory_gives_what_a_repeated_one_gives(opt):
    memory, valid = apply(opt, "encode", uncorrupted(make_batch()))
    ids = np.random.default_rng(3).integers(0, 23, (B, G))
    shared = apply(opt, "text_logits", ids, apply(opt, "text_memory", memory[:1]), valid[:1])
    first = jnp.zeros(B, int)
    repeated = apply(opt, "text_logits", ids, apply(opt, "text_memory", memory[first]), valid[first])
    np.testing.assert_allclose(shared, repeated, atol=1e-5)


def sequence_score(opt, memory, valid, ids, end):
    """Log-probability of each sequence up to and including its first end symbol, by teacher forcing."""
    logits = apply(opt, "text_logits", ids, apply(opt, "text_memory", memory), valid)
    each = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), ids[..., None], -1)[..., 0]
    ended_before = np.cumsum(ids == end, axis=1) - (ids == end) > 0
    return np.where(ended_before, 0, each).sum(1)


def test_greedy_and_beam_search_against_scores_by_teacher_forcing():
    opt = model, params = make(True)
    options = dict(end_id=3, pad_id=0, length_penalty=0.0)
    search = jax.jit(
        lambda memory, valid, length, beams: generate_text(
            model, params, memory, valid, max_length=length, beams=beams, **options
        ),
        static_argnums=(2, 3),
    )
    memory, valid = apply(opt, "encode", uncorrupted(make_batch()))
    greedy, greedy_score = search(memory, valid, 3, 1)
    np.testing.assert_allclose(
        greedy_score, sequence_score(opt, memory, valid, np.asarray(greedy), 3), atol=1e-4
    )
    drawing = dict(what="text", length=3, temperature=0, end_id=3)
    drawn, drawn_score = jax.jit(lambda: sample(model, params, memory, valid, jax.random.key(0), **drawing))()
    ends = np.cumsum(np.asarray(drawn) == 3, axis=1) - (np.asarray(drawn) == 3) > 0
    np.testing.assert_array_equal(np.where(ends, 0, drawn), greedy)
    np.testing.assert_allclose(drawn_score, greedy_score, atol=1e-4)


def test_drawn_text_is_padded_after_its_end_and_scored_by_the_model():
    opt = model, params = make(True)
    memory, valid = apply(opt, "encode", uncorrupted(make_batch()))
    options = dict(max_length=6, end_id=3, pad_id=0, top_p=0.9, temperature=1.5)
    draw = jax.jit(lambda key: generate_text(model, params, memory, valid, key, **options))
    texts, scores = zip(*(draw(jax.random.key(seed)) for seed in range(8)), strict=True)
    assert len(np.unique(np.concatenate(texts), axis=0)) > B
    for ids, score in zip(texts, scores, strict=True):
        ids = np.asarray(ids)
        ended_before = np.cumsum(ids == 3, axis=1) - (ids == 3) > 0
        assert (ids[ended_before] == 0).all()
        np.testing.assert_allclose(score, sequence_score(opt, memory, valid, ids, 3), atol=1e-4)


def test_guidance_leads_away_from_what_is_drawn_of_nothing():
    model, params = make(True)
    inputs = uncorrupted(make_batch())
    shown, nothing = (
        model.apply({"params": params}, x, method="encode")
        for x in (inputs, uncorrupted(make_batch(), (False, False, False)))
    )
    both = tuple(jnp.concatenate(pair) for pair in zip(shown, nothing, strict=True))
    options = {"what": "image", "length": G, "temperature": 0, "guidance": 1.5}
    codes, score = jax.jit(lambda m, v: sample(model, params, m, v, jax.random.key(0), **options))(*both)

    def logits(memory, valid):
        memory_kv = model.apply({"params": params}, memory, method="image_memory")
        return model.apply({"params": params}, codes, memory_kv, valid, method="image_logits")

    seen, unseen = logits(*shown), logits(*nothing)
    np.testing.assert_array_equal(codes, (seen + 1.5 * (seen - unseen)).argmax(-1))
    assert (codes != seen.argmax(-1)).any()
    own = jnp.take_along_axis(jax.nn.log_softmax(seen), codes[..., None], -1)[..., 0].sum(1)
    np.testing.assert_allclose(score, own, rtol=1e-5)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 3.0])
def test_beam_search_finds_the_best_text_of_two_symbols(length_penalty):
    opt = model, params = make(True)
    options = dict(max_length=2, beams=23, end_id=3, pad_id=0, length_penalty=length_penalty)
    memory, valid = apply(opt, "encode", uncorrupted(make_batch()))
    # 23 beams keep every first symbol, which is enough to find the best of all 23 ** 2 pairs.
    found, score = jax.jit(lambda memory, valid: generate_text(model, params, memory, valid, **options))(
        memory, valid
    )
    every = np.stack(np.meshgrid(np.arange(23), np.arange(23), indexing="ij"), -1).reshape(-1, 2)
    lengths = np.where(every[:, 0] == 3, 1, 2)
    for row in range(B):
        rows = jnp.full(len(every), row)
        scores = sequence_score(opt, memory[rows], valid[rows], every, 3)
        best = (scores / lengths**length_penalty).argmax()
        np.testing.assert_allclose(score[row], scores[best], atol=1e-4)
        np.testing.assert_allclose(scores[found[row, 0] * 23 + found[row, 1]], scores[best], atol=1e-4)


def test_beam_search_finds_the_best_picture_of_all():
    codes, grid = 3, 4
    opt = model, params = make(True, dataclasses.replace(SIZES, num_codes=codes, codes_per_image=grid))
    memory, valid = apply(make(True), "encode", uncorrupted(make_batch()))  # compiled already
    every = np.array(list(itertools.product(range(codes), repeat=grid)))
    memory_kv = apply(opt, "image_memory", memory)

    def scores_of_all(row):
        logits = apply(opt, "image_logits", every, memory_kv[:, row : row + 1], valid[row : row + 1])
        log_probs = np.asarray(jax.nn.log_softmax(logits))
        return np.take_along_axis(log_probs, every[..., None], -1)[..., 0].sum(1)

    def found(**options):
        """(place in `every` [B], log-probability [B])"""
        generate = functools.partial(generate_image_codes, model, params, **options)
        found, score = jax.jit(generate)(memory, valid)
        assert found.shape == (B, grid)
        return np.asarray(found) @ codes ** np.arange(grid)[::-1], score

    scores = np.stack([scores_of_all(row) for row in range(B)])
    best, best_score = found(beams=codes ** (grid - 1))  # so many keep every beginning
    np.testing.assert_array_equal(best, scores.argmax(1))
    np.testing.assert_allclose(best_score, scores.max(1), atol=1e-4)
    greedy, greedy_score = found()
    assert (greedy != best).any()
    np.testing.assert_allclose(greedy_score, scores[np.arange(B), greedy], atol=1e-4)
    drawn, drawn_score = found(key=jax.random.key(0), temperature=0)
    np.testing.assert_array_equal(drawn, greedy)
    np.testing.assert_allclose(drawn_score, greedy_score, atol=1e-5)


def test_matching_scores_are_the_sigmoids_of_the_head(opt):
    inputs = uncorrupted(make_batch())
    logits = apply(opt, "matching_logits", apply(opt, "encode", inputs)[0])
    np.testing.assert_allclose(apply(opt, "matching_scores", inputs), 1 / (1 + np.exp(-logits)), rtol=1e-5)


def test_keep_likely_keeps_the_best_and_the_nucleus():
    logits = jnp.log(jnp.array([[0.5, 0.2, 0.15, 0.1, 0.05]]))
    assert (np.asarray(keep_likely(logits, 2, 1.0)) > -1e8).tolist() == [[True, True, False, False, False]]
    assert (np.asarray(keep_likely(logits, 0, 0.6)) > -1e8).tolist() == [[True, True, False, False, False]]
    assert (np.asarray(keep_likely(logits, 0, 0.4)) > -1e8).tolist() == [[True, False, False, False, False]]
    assert (np.asarray(keep_likely(logits, 0, 0.0)) > -1e8).tolist() == [[True, False, False, False, False]]
    assert (np.asarray(keep_likely(logits, 0, 1.0)) > -1e8).all()


@pytest.mark.parametrize(("changes", "key"), [(dict(unroll=3), None), (dict(remat=True), 5)])
def test_unrolling_and_rematerialisation_change_no_value(changes, key):
    model, params = make(True)
    other = OPT(dict(model.config) | changes, SIZES)
    dropout = () if key is None else (jax.random.key(key),)
    one, _ = apply((model, params), "encode", uncorrupted(make_batch()), *dropout)
    two, _ = apply((other, params), "encode", uncorrupted(make_batch()), *dropout)
    np.testing.assert_allclose(one, two, atol=1e-5)
