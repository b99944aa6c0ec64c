"""The exported PyTorch model against the network that it was exported from: outputs and gradients."""

import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opt_jax.configuration import load
from opt_jax.convert import opt as conversion
from opt_jax.convert.__main__ import main
from opt_jax.convert.export import Exported, write_folder
from opt_jax.convert.layout import tensors as tensors_of_lines
from opt_jax.encoders.frozen import load_frozen
from opt_jax.evaluation.scorers import Model
from opt_jax.models.generation import generate_image_codes, generate_text, keep_likely
from opt_jax.models.inputs import Statistics
from opt_jax.models.opt import OPT
from opt_jax.objectives.masked import cross_entropy
from opt_jax.partitioning import path_name, unbox

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from exported_toy import (  # noqa: E402
    COMPILE_QUICKLY,
    HEADS,
    SIZES,
    TOKENS,
    B,
    G,
    N,
    T,
    both,  # noqa: F401
    draw_params,
    inputs_of,
    make_batch,
    make_statistics,
    model_config,
    ours,
    outputs,
    same,
    tensors_of,
)

from opt_jax.export import generation_opt_jax  # noqa: E402
from opt_jax.export.modeling_opt_jax import OptJaxModel  # noqa: E402

ROOT = Path(__file__).parents[2]
RATE = 0.05  # of a step of gradient descent
SUBSETS = [keep for keep in itertools.product([True, False], repeat=3) if any(keep)]


def compare(output, model, expected, valid, keep, rows=slice(None)):
    """The output of the PyTorch model, at positions that are attended, with rows of the network's."""
    memory = output.last_hidden_state

    def at(x):
        return x[output.attention_mask]

    same(at(memory), expected["memory"][rows][valid], "memory")
    assert len(output.hidden_states) == len(expected["states"]) == 4
    for number, (found, state) in enumerate(zip(output.hidden_states, expected["states"], strict=True)):
        same(at(found), state[rows][valid], f"state {number}")
    for name in HEADS:
        same(at(getattr(model, name)(memory)), expected[name][rows][valid], name)
    same(output.matching_logits, expected["matching_logits"][rows], "matching_logits")
    same(output.matching_logits.sigmoid(), expected["scores"][rows], "matching scores")
    same(output.logits, expected["logits"][rows], "class logits", 1e-6)  # there [CLS] is read in float32
    same(output.text_logits, expected["text"][rows], "text")
    same(output.image_logits, expected["image"][rows], "image")
    for name, kept in zip(("text", "image", "audio"), keep, strict=True):
        found = getattr(output, f"{name}_embeds")
        if kept and "embeds" in expected:
            same(found, expected["embeds"][name][rows], f"{name} embedding")
        else:
            assert found is None


@pytest.mark.parametrize("keep", SUBSETS, ids=lambda keep: "".join(np.array(list("TIA"))[list(keep)]))
def test_outputs_agree_for_every_subset_padded_and_unpadded(both, keep):  # noqa: F811
    batch = make_batch()
    expected = ours(both, batch, keep)
    with torch.no_grad():
        output = both.model(**tensors_of(batch, keep), output_hidden_states=True)
        compare(output, both.model, expected, expected["valid"], keep)
        for row in range(B):
            output = both.model(**tensors_of(batch, keep, row), output_hidden_states=True)
            assert output.attention_mask.all()
            rows = slice(row, row + 1)
            compare(output, both.model, expected, expected["valid"][rows], keep, rows)


def test_rows_may_lack_different_modalities(both):  # noqa: F811
    batch, keep = make_batch(), np.array([[True, False, True], [False, True, True], [True, True, False]])
    expected = ours(both, batch, keep)
    absent = dict(zip(("text_valid", "region_valid", "audio_valid"), keep, strict=True))
    shown = batch | {name: batch[name] & kept[:, None] for name, kept in absent.items()}
    with torch.no_grad():
        output = both.model(**tensors_of(shown, (True, True, True)), output_hidden_states=True)
    assert all(torch.isfinite(state).all() for state in output.hidden_states)
    same(output.last_hidden_state[output.attention_mask], expected["memory"][expected["valid"]], "memory")
    same(output.matching_logits, expected["matching_logits"], "matching")
    same(output.logits, expected["logits"], "class logits", 1e-6)
    same(output.text_logits, expected["text"], "text")


def test_generation_agrees(both):  # noqa: F811
    batch, lengths = make_batch(), dict(end_id=TOKENS.sep_id, pad_id=TOKENS.pad_id)
    expected = ours(both, batch, (True, True, True))
    with torch.no_grad():
        output = both.model(**tensors_of(batch, (True, True, True)))
    seen = set()
    for options in (dict(beams=1), dict(beams=3), dict(beams=4, length_penalty=0.3)):

        def write(memory, valid, options=options):
            return generate_text(both.network, both.params, memory, valid, max_length=T, **lengths, **options)

        with jax.enable_x64(True):
            ids, score = jax.jit(write, compiler_options=COMPILE_QUICKLY)(
                expected["memory"], expected["valid"]
            )
        beams = {"num_beams": options.pop("beams")}
        found, found_score = both.model.generate_text(output, max_length=T, **beams, **options)
        np.testing.assert_array_equal(found.numpy(), np.asarray(ids))
        same(found_score, score, "log-probability of a text")
        seen |= {tuple(row) for row in found.tolist()}
    assert len({TOKENS.sep_id in row for row in seen}) == 2 and len(seen) > B

    def draw(memory, valid):
        return generate_image_codes(both.network, both.params, memory, valid, jax.random.key(0), top_k=1)

    with jax.enable_x64(True):
        codes, score = jax.jit(draw, compiler_options=COMPILE_QUICKLY)(expected["memory"], expected["valid"])
    found, found_score = both.model.generate_image_codes(output, top_k=1)
    np.testing.assert_array_equal(found.numpy(), np.asarray(codes))
    same(found_score, score, "log-probability of codes")


def test_guided_codes_agree(both):  # noqa: F811
    """A row alone, and padded ones; `gumbel` is the noise of `jax.random`, checked elsewhere."""
    batch, key, found = make_batch(), jax.random.key(3), {}
    scorer = Model(both.network, both.params, make_statistics())
    tensors = tensors_of(batch, (True, False, True))
    del tensors["audio_masked"]
    with torch.no_grad():
        output = both.model(**tensors)
    with jax.enable_x64(True):
        noise = [jax.random.gumbel(jax.random.fold_in(key, step), (B, 9), float) for step in range(G)]
        noise = np.asarray(noise)
        for guidance in (0.0, 1.5):

            def draw(guidance=guidance):
                shown = batch | {"present": np.ones((B, 3), bool)}
                options = {"keep": (True, False, True), "top_k": 5, "guidance": guidance}
                return scorer._codes(both.params, shown, key, **options)

            expected = jax.jit(draw, compiler_options=COMPILE_QUICKLY)()
            options = {"top_k": 5, "guidance": guidance, "noise": lambda step, shape: noise[step]}
            found[guidance], _ = both.model.generate_image_codes(output, **options)
            np.testing.assert_array_equal(found[guidance].numpy(), np.asarray(expected))
    assert (found[0.0] != found[1.5]).any()


def test_a_tuple_is_the_output_in_order(both):  # noqa: F811
    inputs = {"input_ids": torch.tensor([[2, 7, 8]])}
    with torch.no_grad():
        found, expected = both.model(**inputs, return_dict=False), both.model(**inputs)
    assert isinstance(found, tuple) and len(found) == len(expected.keys())
    for one, other in zip(found, expected.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_what_gives_no_loss_or_no_symbol_is_refused(both):  # noqa: F811
    inputs = {"input_ids": torch.tensor([[2, 7, 8]])}
    for name in ("labels", "image_codes"):
        with pytest.raises(ValueError, match=f"{name} are -100 everywhere"):
            both.model(**inputs, **{name: torch.full((1, G), -100)})
    output = both.model(**inputs)
    for wrong in ({"max_length": 0}, {"max_length": -3}, {"num_beams": 0}, {"num_beams": 1.5}):
        with pytest.raises(ValueError, match="expected a whole number from 1 on"):
            both.model.generate_text(output, **wrong)


@pytest.mark.slow
def test_drawn_texts_are_padded_and_scored_by_the_model(both):  # noqa: F811
    batch, keep = make_batch(), (False, True, False)
    with torch.no_grad():
        output = both.model(**tensors_of(batch, keep))
    options = dict(max_length=N, do_sample=True, temperature=1.5, top_p=0.95)
    texts = set()
    for seed in range(5):
        ids, score = both.model.generate_text(
            output, generator=torch.Generator().manual_seed(seed), **options
        )
        ended = torch.cumsum(ids == TOKENS.sep_id, 1) - (ids == TOKENS.sep_id).long() > 0
        assert (ids[ended] == TOKENS.pad_id).all()
        with torch.no_grad():
            logits = both.model.text_logits(ids, output.last_hidden_state, output.attention_mask)
        each = logits.log_softmax(-1).gather(2, ids[..., None])[..., 0]
        torch.testing.assert_close(score, each.masked_fill(ended, 0).sum(1), rtol=0, atol=1e-10)
        texts |= {tuple(row) for row in ids.tolist()}
    assert len(texts) > B


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (4, 1.0), (0, 0.6), (6, 0.8), (0, 0.0)])
def test_the_same_symbols_are_kept(top_k, top_p):
    logits = np.random.default_rng(0).normal(size=(3, 11)).astype(np.float32)
    found = generation_opt_jax.keep_likely(torch.from_numpy(logits), top_k, top_p)
    np.testing.assert_array_equal(found.numpy(), keep_likely(jnp.asarray(logits), top_k, top_p))


def text_loss(network, params, batch, labels):
    inputs = inputs_of(batch, np.ones((3, B, 1), bool))
    memory, valid = network.apply({"params": params}, inputs, method="encode")
    kv = network.apply({"params": params}, memory, method="text_memory")
    logits = network.apply({"params": params}, labels, kv, valid, method="text_logits")
    total, count = cross_entropy(logits, labels, labels != TOKENS.pad_id)
    return total / count


def test_gradients_of_the_text_loss_and_a_step_along_them_agree(both):  # noqa: F811
    batch = make_batch()
    with jax.enable_x64(True):
        run = jax.jit(
            jax.value_and_grad(lambda params: text_loss(both.network, params, batch, batch["labels"])),
            compiler_options=COMPILE_QUICKLY,
        )
        loss, gradients = jax.device_get(run(both.params))
        stepped = jax.tree.map(lambda x, gradient: x - RATE * gradient, both.params, gradients)
        loss_after = jax.device_get(run(stepped)[0])
    assert abs(loss_after - loss) > 1e-3
    tensors = tensors_of(batch, (True, True, True))
    tensors["labels"][tensors["labels"] == TOKENS.pad_id] = -100
    del tensors["image_codes"]
    output = both.model(**tensors)
    same(output.loss, loss, "loss")
    both.model.zero_grad()
    output.loss.backward()
    config = json.loads((both.folder / "config.json").read_text())
    gradients = {path_name(path): x for path, x in jax.tree_util.tree_flatten_with_path(gradients)[0]}
    parameters, moved = dict(both.model.named_parameters()), 0
    lines = [line for line in conversion.table(config) if not line.path.startswith("classes/")]
    for name, line, index in tensors_of_lines(lines, conversion.shapes(config)):
        expected = line.layout.to_tensor(gradients[line.path][index])
        found = parameters[name].grad
        found = np.zeros_like(expected) if found is None else found.numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10, err_msg=name)
        moved += bool(np.abs(expected).max() > 1e-6)
    assert moved > 80
    before = {name: x.clone() for name, x in both.model.state_dict().items()}
    torch.optim.SGD(both.model.parameters(), lr=RATE).step()
    with torch.no_grad():
        same(both.model(**tensors).loss, loss_after, "loss after a step", tolerance=1e-9)
    both.model.load_state_dict(before)
    both.model.zero_grad()


def test_every_parameter_comes_back_bit_by_bit(both, tmp_path):  # noqa: F811
    main(["import", "--kind=opt", f"--source={both.folder}", f"--out={tmp_path / 'back'}"])
    back, config = load_frozen(tmp_path / "back")
    assert config["standardised"] and config["pre_norm"] == both.network.config["pre_norm"]
    jax.tree.map(np.testing.assert_array_equal, back.pop("classes"), both.classes)
    assert jax.tree.structure(back) == jax.tree.structure(both.params)
    jax.tree.map(np.testing.assert_array_equal, back, both.params)


def test_what_pytorch_saves_comes_back(both, tmp_path):  # noqa: F811
    """As after a fine-tuning there: one tensor has moved."""
    model = OptJaxModel.from_pretrained(both.folder, dtype=torch.float64)
    with torch.no_grad():
        model.encoder.layers[1].self_attention.key.bias += 1
    model.save_pretrained(tmp_path / "tuned")
    main(["import", "--kind=opt", f"--source={tmp_path / 'tuned'}", f"--out={tmp_path / 'back'}"])
    back = load_frozen(tmp_path / "back")[0]
    moved = back["encoder"]["layers"]["qkv"]["bias"] - both.params["encoder"]["layers"]["qkv"]["bias"]
    expected = np.zeros_like(moved)
    expected[1, 1] = 1
    np.testing.assert_allclose(moved, expected, rtol=0, atol=1e-15)


def test_float32_agrees(tmp_path):
    network, batch, keep = (
        OPT(model_config(True, 2, "float32"), SIZES),
        make_batch(),
        np.ones((3, B, 1), bool),
    )
    batch = {name: x.astype(np.float32) if x.dtype == np.float64 else x for name, x in batch.items()}
    statistics = jax.tree.map(np.float32, vars(make_statistics()))
    params = draw_params(network, np.float32)
    write_folder(Exported(network, params, Statistics(**statistics), TOKENS), tmp_path / "folder")
    zeros = {"kernel": np.zeros((32, 1), np.float32), "bias": np.zeros(1, np.float32)}
    run = jax.jit(lambda: outputs(network, params, zeros, batch, keep), compiler_options=COMPILE_QUICKLY)
    expected = jax.device_get(run())
    model = OptJaxModel.from_pretrained(tmp_path / "folder")
    with torch.no_grad():
        output = model(**tensors_of(batch, (True, True, True)))
    memory = output.last_hidden_state[output.attention_mask]
    same(memory, expected["memory"][expected["valid"]], "memory", 1e-5)
    for name, logits in (("text", output.text_logits), ("image", output.image_logits)):
        same(logits, expected[name], name, 1e-5)
    same(output.matching_logits, expected["matching_logits"], "matching", 1e-5)
    same(output.audio_embeds, expected["embeds"]["audio"], "embedding", 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("float64", 1e-10)])
def test_the_base_model_agrees(dtype, tolerance, tmp_path):
    """With the weights of its initialisation; the sizes of the data are the toy's."""
    config = load(ROOT / "configs" / "pretrain.py", "base").model.to_dict() | {"dtype": dtype}
    network, batch = OPT(config, SIZES), make_batch()
    batch = {name: x.astype(dtype) if x.dtype == np.float64 else x for name, x in batch.items()}
    statistics = {name: x.astype(dtype) for name, x in vars(make_statistics()).items()}
    with jax.enable_x64(dtype == "float64"):
        init = jax.jit(
            lambda: unbox(network.init(jax.random.key(0), *conversion.smallest_batch(SIZES))["params"])
        )
        params = jax.tree.map(lambda leaf: np.asarray(leaf, dtype), jax.device_get(init()))

        def run(params, keep):
            inputs = inputs_of(batch, keep)
            memory, valid = network.apply({"params": params}, inputs, method="encode")
            found = {"memory": memory, "valid": valid}
            for name, symbols in (("text", batch["labels"]), ("image", batch["codes"])):
                kv = network.apply({"params": params}, memory, method=f"{name}_memory")
                found[name] = network.apply({"params": params}, symbols, kv, valid, method=f"{name}_logits")
            return found

        run = jax.jit(run)
        shown = [np.tile(np.reshape(keep, (3, 1, 1)), (1, B, 1)) for keep in SUBSETS]
        expected = [jax.device_get(run(params, keep)) for keep in shown]
    write_folder(Exported(network, params, Statistics(**statistics), TOKENS), tmp_path / "out", dtype=dtype)
    model = OptJaxModel.from_pretrained(tmp_path / "out", dtype=getattr(torch, dtype))
    for keep, ours in zip(SUBSETS, expected, strict=True):
        with torch.no_grad():
            output = model(**tensors_of(batch, keep))
        found = output.last_hidden_state[output.attention_mask]
        same(found, ours["memory"][ours["valid"]], f"M {keep}", tolerance)
        same(output.text_logits, ours["text"], f"text {keep}", tolerance)
        same(output.image_logits, ours["image"], f"image {keep}", tolerance)
