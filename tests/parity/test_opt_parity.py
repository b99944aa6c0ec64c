"""The whole network and every pre-training loss against the PyTorch network of the benchmark, in float64."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from opt_jax.models.inputs import uncorrupted
from opt_jax.models.opt import OPT, Sizes
from opt_jax.objectives.corruption import MODALITY, SAMPLE, TOKEN, Corruption, corrupt, rows_of
from opt_jax.objectives.matching import draw_donors
from opt_jax.partitioning import path_name, unbox
from opt_jax.pretraining import forward

torch = pytest.importorskip("torch")

from opt_jax.benchmark.torch_opt import TorchOPT, copy_parameters  # noqa: E402
from opt_jax.benchmark.torch_step import losses, to_torch  # noqa: E402

B, T, V, A, G, ROWS = 8, 6, 4, 5, 4, (1, 2, 1)
LENGTHS = (T, V, A)
SIZES = Sizes(
    vocab_size=17, region_size=6, audio_size=5, num_region_classes=4, num_codes=9, codes_per_image=G
)
CORRUPTION = Corruption(
    rows=ROWS,
    mask_probability=0.3,
    word_drop_probability=0.4,
    drop_probability=(0.3,) * 3,
    dropped_as_absent=0.5,
    placeholder_lengths=(3, 4, 2),
    sample_drop_probability=0.0,
    vocab_size=17,
    mask_id=4,
    sep_id=3,
    first_word_id=5,
)
WEIGHTS = dict.fromkeys(["mlm", "mvfr", "mrc", "mafr", "macl", "dtr", "dir", "matching"], 1.0)
OBJECTIVES = ConfigDict(dict(macl_temperature=0.1, label_smoothing=0.1, hard_negative_fraction=0.0))
HEADS = ("word_logits", "region_predictions", "region_class_logits", "frame_predictions")
LOSS_KEY = 3
COMPILE_QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def model_config(pre_norm, num_alignment_layers):
    decoder = dict(num_layers=2, num_heads=2, mlp_size=12)
    return dict(
        hidden_size=8,
        num_layers=3,
        num_heads=4,
        mlp_size=16,
        dropout=0.0,
        pre_norm=pre_norm,
        layer_norm_epsilon=1e-12,
        num_alignment_layers=num_alignment_layers,
        alignment_size=6,
        temperature_init=0.07,
        temperature_min=0.01,
        max_text_positions=T + 1,
        max_audio_positions=A + 2,
        frame_window=3 if num_alignment_layers else 0,
        remat=False,
        unroll=1,
        dtype="float64",
        initializer_range=0.3,
        text_decoder=decoder,
        image_decoder=dict(decoder, num_heads=4),
    )


def make_batch():
    """Uneven lengths; row 1 has no picture, row 6 no audio; rows 0 and 5 say the same."""
    rng = np.random.default_rng(0)
    lengths = [[6, 4, 5], [4, 0, 3], [6, 3, 5], [5, 4, 4], [3, 4, 4], [6, 1, 5], [5, 2, 0], [4, 3, 5]]
    lengths = np.array(lengths)
    valid = [np.arange(size) < lengths[:, m, None] for m, size in enumerate(LENGTHS)]
    return {
        "text_ids": np.where(valid[0], rng.integers(5, 17, (B, T)), 0).astype(np.int32),
        "text_valid": valid[0],
        "region_features": rng.normal(size=(B, V, 6)),
        "region_boxes": rng.random((B, V, 7)),
        "region_classes": rng.integers(1, 5, (B, V)).astype(np.int32),
        "region_valid": valid[1],
        "audio_features": rng.normal(size=(B, A, 5)),
        "audio_valid": valid[2],
        "image_codes": rng.integers(0, 9, (B, G)).astype(np.int32),
        "present": lengths > 0,
        "caption_key": np.array([0, 1, 2, 3, 4, 0, 6, 7], np.int32),
    }


@pytest.fixture(scope="module")
def corrupted():
    """(batch, donors, found): row 0 has masked words, row 4 masked regions and frames."""
    with jax.enable_x64(True):

        @jax.jit
        def prepare(key, clean):
            batch = corrupt(key, clean, CORRUPTION)
            replaced, own = (rows_of(batch[name], SAMPLE, ROWS) for name in ("replaced", "caption_key"))
            keys = (own, batch["caption_key"])
            key = jax.random.split(jax.random.key(LOSS_KEY), 6)[1]  # the one `forward` draws donors with
            return batch, *draw_donors(key, replaced, batch["clean"], keys, None, 0.0)

        prepared = jax.tree.map(np.array, prepare(jax.random.key(5), make_batch()))
    batch, donors, found = prepared
    # Token-level rows mask one modality each; two rows cannot cover three, so row 4 gets more masks.
    for name in ("region", "audio"):
        batch[f"{name}_masked"][4, :2] = True
    batch["text_masked"][0, 1:3] = True
    assert batch["replaced"].any() and found.all()
    assert not rows_of(batch["fused"], MODALITY, ROWS).all()
    assert not rows_of(batch["text_masked"], TOKEN, ROWS).all()
    return batch, donors, found


def draw_params(model):
    """Float64 parameters, biases and norms drawn too."""
    clean = make_batch()
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), uncorrupted(clean), clean["image_codes"])["params"]
    )
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        return rng.normal(scale=0.3, size=leaf.shape) + path_name(path).endswith("scale")

    return jax.tree_util.tree_map_with_path(draw, unbox(shapes))


def assert_same(found, expected, what):
    found, expected = np.asarray(found), expected.detach().numpy()
    scale = np.abs(expected).max()
    assert found.dtype == np.float64 and scale > 0.05, what
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9 * scale, err_msg=what)


@pytest.mark.parametrize("pre_norm, aligned", [(False, 0), (True, 2)], ids=["paper", "pre-norm aligned"])
def test_network_and_losses(pre_norm, aligned, corrupted):
    batch, donors, found = corrupted
    config = model_config(pre_norm, aligned)
    model, weights = OPT(config, SIZES), WEIGHTS | ({"contrastive": 1.0} if aligned else {})

    def ours(params, batch):
        def apply(method, *args):
            return model.apply({"params": params}, *args, method=method)

        states, valid = apply("align", batch)
        memory = apply("fuse", states, valid, LENGTHS)
        out = {method: apply(method, memory) for method in (*HEADS, "matching_logits")}
        out["text"] = apply("text_logits", batch["text_ids"][:, 1:], apply("text_memory", memory), valid)
        out["image"] = apply("image_logits", batch["image_codes"], apply("image_memory", memory), valid)
        key = jax.random.key(LOSS_KEY)
        return states, memory, valid, out, forward(model, params, batch, key, weights, ROWS, OBJECTIVES)

    with jax.enable_x64(True):
        params = draw_params(model)
        run = jax.jit(ours, compiler_options=COMPILE_QUICKLY)
        states, memory, valid, out, found_losses = jax.device_get(run(params, batch))

    network = TorchOPT(config, SIZES).double().eval()
    copy_parameters(network, params)
    tensors = to_torch(batch, dtype=torch.float64)
    theirs, theirs_valid, groups = network.align(tensors)
    assert_same(states[valid], theirs[theirs_valid], "states")
    theirs = network.encoder.fuse(theirs, theirs_valid, groups)
    assert_same(memory[valid], theirs[theirs_valid], "memory")
    for method in HEADS:
        assert_same(out[method][valid], getattr(network, method)(theirs)[theirs_valid], method)
    assert_same(out["matching_logits"], network.matching_logits(theirs), "matching_logits")
    assert_same(out["text"], network.text_logits(tensors["text_ids"][:, 1:], theirs, theirs_valid), "text")
    assert_same(out["image"], network.image_logits(tensors["image_codes"], theirs, theirs_valid), "image")

    donors, found = torch.from_numpy(donors), torch.from_numpy(found)
    expected_losses = losses(network, tensors, donors, found, weights, ROWS, OBJECTIVES)
    assert set(expected_losses) == set(weights)
    for name, (expected, count) in expected_losses.items():
        assert float(found_losses[name][1]) == float(count) > 0, name
        assert_same(found_losses[name][0], expected, name)


def test_a_tree_that_does_not_fill_the_network_is_refused():
    network = TorchOPT(model_config(False, 0), SIZES)
    with pytest.raises(ValueError, match="TorchOPT: the tree has 16 numbers"):
        copy_parameters(network, {"embedder": {"text_norm": {"scale": np.ones(8), "bias": np.ones(8)}}})
