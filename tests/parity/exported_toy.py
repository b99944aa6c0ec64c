"""A toy network, the folder that is exported from it, and what the two are compared by."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch

from opt_jax.convert import opt as conversion
from opt_jax.convert.export import Exported, write_folder
from opt_jax.export.modeling_opt_jax import OptJaxModel
from opt_jax.models.cross_encoder import group_ids
from opt_jax.models.inputs import Statistics, standardise, uncorrupted
from opt_jax.models.layers import dense
from opt_jax.models.opt import OPT, Sizes
from opt_jax.partitioning import path_name, unbox
from opt_jax.tasks.classification import class_logits

torch.set_num_threads(1)  # of a toy's tensors two threads mostly wait for each other
B, T, V, A, N, G, CLASSES = 3, 6, 4, 5, 5, 4, 3
LENGTHS = (T, V, A)
SIZES = Sizes(
    vocab_size=17, region_size=6, audio_size=5, num_region_classes=4, num_codes=9, codes_per_image=G
)
TOKENS = SimpleNamespace(pad_id=0, cls_id=2, sep_id=3, mask_id=4)
HEADS = ("word_logits", "region_predictions", "region_class_logits", "frame_predictions")
COMPILE_QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
# Norms before each block, layers of alignment, dtype; most tests are run on the first two.
VARIANTS = {
    "pre-norm aligned": (True, 2, "float64"),
    "post-norm": (False, 0, "float64"),
    "pre-norm aligned, float32": (True, 2, "float32"),
    "post-norm, float32": (False, 0, "float32"),
}
TOLERANCE = {"float64": 1e-10, "float32": 1e-5}


def model_config(pre_norm, num_alignment_layers, dtype):
    decoder = dict(num_layers=2, num_heads=2, mlp_size=12)
    return dict(
        hidden_size=8,
        num_layers=3,
        num_heads=4,
        mlp_size=16,
        dropout=0.1,
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
        dtype=dtype,
        initializer_range=0.3,
        text_decoder=decoder,
        image_decoder=dict(decoder, num_heads=4),
    )


def make_batch(dtype="float64", sizes=SIZES):
    """Rows of uneven lengths; some features are masked."""
    rng = np.random.default_rng(0)
    lengths = np.array([[6, 4, 3], [4, 2, 5], [5, 3, 4]])
    text, region, audio = (np.arange(n) < lengths[:, m, None] for m, n in enumerate(LENGTHS))
    ids = np.where(text, rng.integers(5, sizes.vocab_size, (B, T)), TOKENS.pad_id)
    ids[:, 0] = TOKENS.cls_id
    labels = rng.integers(5, sizes.vocab_size, (B, N))
    labels[:, 2], labels[0, 3:] = TOKENS.sep_id, TOKENS.pad_id
    batch = {
        "text_ids": ids,
        "text_valid": text,
        "region_features": rng.normal(2, 3, (B, V, sizes.region_size)),
        "region_boxes": rng.random((B, V, 7)),
        "region_masked": rng.random((B, V)) < 0.3,
        "region_valid": region,
        "audio_features": rng.normal(-1, 2, (B, A, sizes.audio_size)),
        "audio_masked": rng.random((B, A)) < 0.3,
        "audio_valid": audio,
        "labels": labels,
        "codes": rng.integers(0, sizes.num_codes, (B, sizes.codes_per_image)),
    }
    return {name: x.astype(dtype) if x.dtype == np.float64 else x for name, x in batch.items()}


def make_statistics(dtype="float64", sizes=SIZES):
    rng, parts = np.random.default_rng(2), []
    for size in (sizes.region_size, sizes.audio_size):
        parts += [rng.normal(size=size), rng.uniform(1, 3, size)]
    return Statistics(*(part.astype(dtype) for part in parts))


def make_classes(dtype, width):
    rng = np.random.default_rng(4)
    shapes = {"kernel": (4 * width, CLASSES), "bias": (CLASSES,)}
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def draw_params(network, dtype):
    """Biases and norms drawn too; factors with which texts and codes differ by row, and some texts end."""
    init = lambda: network.init(jax.random.key(0), *conversion.smallest_batch(SIZES))["params"]  # noqa: E731
    rng = np.random.default_rng(1)
    factors = {"embedder/words": 2}
    for decoder in ("text_decoder", "image_decoder"):
        if network.config["pre_norm"]:
            factors |= {f"{decoder}/layers/{name}/kernel": 6 for name in ("mlp_in", "mlp_out")}
        else:
            factors[f"{decoder}/layers/cross_out/kernel"] = 4
    if network.config["pre_norm"]:
        factors |= {"image_decoder/layers/cross_out/kernel": 4, "image_decoder/output_bias": 0.1}

    def draw(path, leaf):
        name = path_name(path)
        values = rng.normal(scale=0.3, size=leaf.shape) + name.endswith("scale")
        values *= factors.get(name, 1)
        if name == "text_decoder/output_bias":
            values[TOKENS.sep_id] += 3
        return np.asarray(values, dtype)

    return jax.tree_util.tree_map_with_path(draw, unbox(jax.eval_shape(init)))


def inputs_of(batch, keep):
    """Inputs of the network: `keep` [3, B, 1] says which modalities each row has."""
    features = batch["region_features"]
    sizes = SimpleNamespace(region_size=features.shape[-1], audio_size=batch["audio_features"].shape[-1])
    statistics = make_statistics(features.dtype.name, sizes)
    inputs = uncorrupted(standardise(batch, statistics, features.dtype), keep)
    return inputs | {name: batch[name] for name in ("region_masked", "audio_masked")}


def every_state(network, params, inputs):
    """The embedded inputs and the output of every layer, [B, S, D] each."""

    def aligned(layers):
        part = OPT(dict(network.config) | {"num_alignment_layers": layers}, network.sizes)
        return part.apply({"params": params}, inputs, method="align")

    states = [aligned(layers)[0] for layers in range(network.config["num_alignment_layers"] + 1)]
    valid = aligned(0)[1]

    def fused(network, x):
        encoder, found = network.encoder, []
        if encoder.num_alignment_layers:
            told = dense(encoder.agreement, encoder.agreements(x, valid, group_ids(*LENGTHS)))
            x = x.at[:, 0].add(told)
        for layer in range(encoder.num_alignment_layers, network.config["num_layers"]):
            x = encoder.layers(x, valid[:, None, None], start=layer, stop=layer + 1)
            found.append(x)
        return found

    return states + network.apply({"params": params}, states[-1], method=fused)


def outputs(network, params, classes, batch, keep):
    """What PyTorch is compared with, by name."""

    def apply(method, *args):
        return network.apply({"params": params}, *args, method=method)

    inputs = inputs_of(batch, keep)
    memory, valid = apply("encode", inputs)
    out = {method: apply(method, memory) for method in (*HEADS, "matching_logits")}
    out |= {"valid": valid, "memory": memory, "states": every_state(network, params, inputs)}
    out["scores"] = apply("matching_scores", inputs)
    out["logits"] = class_logits(classes, memory, valid, LENGTHS)
    if network.config["num_alignment_layers"]:
        out["embeds"] = apply("embeddings", *apply("align", inputs), LENGTHS)
    out["text"] = apply("text_logits", batch["labels"], apply("text_memory", memory), valid)
    out["image"] = apply("image_logits", batch["codes"], apply("image_memory", memory), valid)
    return out


def tensors_of(batch, keep, row=None):
    """Inputs of the PyTorch model: the whole batch with masks, or one row without padding or masks."""
    found = {"labels": batch["labels"], "image_codes": batch["codes"]}
    if row is not None:
        found = {name: x[row : row + 1] for name, x in found.items()}
    names = {
        "text": {"text_ids": "input_ids", "text_valid": "attention_mask"},
        "region": {
            "region_features": "region_features",
            "region_boxes": "region_boxes",
            "region_masked": "region_masked",
            "region_valid": "region_attention_mask",
        },
        "audio": {
            "audio_features": "audio_features",
            "audio_masked": "audio_masked",
            "audio_valid": "audio_attention_mask",
        },
    }
    for (modality, fields), kept in zip(names.items(), keep, strict=True):
        length = batch[f"{modality}_valid"][row].sum() if row is not None else None
        for ours, theirs in fields.items() if kept else ():
            if row is None:
                found[theirs] = batch[ours]
            elif not ours.endswith("valid"):
                found[theirs] = batch[ours][row : row + 1, :length]
    return {name: torch.from_numpy(np.array(x)) for name, x in found.items()}


def same(found, expected, what, least=0.01):
    """Asserts that shapes and dtypes are equal, and the numbers within TOLERANCE times the largest magnitude
    among the expected ones, or times 1 where that is smaller; and that the largest is above `least`."""
    found, expected = found.detach().numpy(), np.asarray(expected)
    assert found.shape == expected.shape and found.dtype == expected.dtype, what
    assert np.abs(expected).max() > least, what
    tolerance = TOLERANCE[expected.dtype.name] * max(1, np.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance, err_msg=what)


def exported_both(network, params, folder):
    """A network with its parameters, compiled, and the folder exported from it, loaded."""
    dtype, sizes = network.config["dtype"], network.sizes
    classes = make_classes(dtype, network.config["hidden_size"])
    statistics = make_statistics(dtype, sizes)
    write_folder(Exported(network, params, statistics, TOKENS, classes, ("a", "b", "c")), folder, dtype=dtype)
    run = jax.jit(
        lambda params, classes, batch, keep: outputs(network, params, classes, batch, keep),
        compiler_options=COMPILE_QUICKLY,
    )
    model = OptJaxModel.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    found = {"network": network, "params": params, "classes": classes, "dtype": dtype, "run": run}
    return SimpleNamespace(folder=folder, model=model, batch=make_batch(dtype, sizes), **found)


@pytest.fixture(scope="module", params=list(VARIANTS)[:2])
def both(request, tmp_path_factory):
    """`exported_both` of a toy network, with a `batch`."""
    network = OPT(model_config(*VARIANTS[request.param]), SIZES)
    with jax.enable_x64(network.config["dtype"] == "float64"):
        params = draw_params(network, network.config["dtype"])
        return exported_both(network, params, tmp_path_factory.mktemp("exported") / "folder")


def on_every_variant(*slow):
    """Runs a test with `both` of every variant, of which some are for the slow ones."""
    marked = [pytest.param(name, marks=pytest.mark.slow if name in slow else ()) for name in VARIANTS]
    return pytest.mark.parametrize("both", marked, indirect=True)


def ours(both, keep):
    """Outputs of the network for the subset `keep` of the modalities, or one subset for each row."""
    with jax.enable_x64(both.dtype == "float64"):
        return jax.device_get(both.run(both.params, both.classes, both.batch, of_rows(keep)))


def of_rows(keep):
    """[3, B, 1] of a subset of the modalities, or of one for each row."""
    keep = np.array(keep)
    return np.broadcast_to(keep[:, None, None] if keep.ndim == 1 else keep[..., None], (3, B, 1))
