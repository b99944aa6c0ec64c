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
from opt_jax.convert.layout import tensors as tensors_of_lines
from opt_jax.encoders.frozen import load_frozen
from opt_jax.evaluation.scorers import Model
from opt_jax.models.generation import generate_image_codes, generate_text, keep_likely
from opt_jax.models.opt import OPT, Sizes
from opt_jax.objectives.masked import cross_entropy
from opt_jax.partitioning import path_name, unbox
from opt_jax.tasks.classification import class_logits

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from exported_toy import (  # noqa: E402
    COMPILE_QUICKLY,
    HEADS,
    LENGTHS,
    TOKENS,
    B,
    G,
    N,
    T,
    both,  # noqa: F401
    exported_both,
    inputs_of,
    make_statistics,
    of_rows,
    on_every_variant,
    ours,
    same,
    tensors_of,
)

from opt_jax.export import generation_opt_jax  # noqa: E402
from opt_jax.export.modeling_opt_jax import OptJaxModel  # noqa: E402

ROOT = Path(__file__).parents[2]
RATE = 0.05  # of a step of gradient descent
SUBSETS = [keep for keep in itertools.product([True, False], repeat=3) if any(keep)]


def compare(output, exported, expected, keep, rows=slice(None)):
    """The output of the PyTorch model, at positions that are attended, with rows of the network's."""
    memory, valid = output.last_hidden_state, expected["valid"][rows]

    def at(x):
        return x[output.attention_mask]

    same(at(memory), expected["memory"][rows][valid], "memory")
    assert len(output.hidden_states) == len(expected["states"]) == exported.network.config["num_layers"] + 1
    for number, (found, state) in enumerate(zip(output.hidden_states, expected["states"], strict=True)):
        same(at(found), state[rows][valid], f"state {number}")
    for name in HEADS:
        same(at(getattr(exported.model, name)(memory)), expected[name][rows][valid], name)
    same(output.matching_logits, expected["matching_logits"][rows], "matching_logits")
    same(output.matching_logits.sigmoid(), expected["scores"][rows], "matching scores")
    same(output.logits, expected["logits"][rows], "class logits")
    same(output.text_logits, expected["text"][rows], "text")
    same(output.image_logits, expected["image"][rows], "image")
    for name, kept in zip(("text", "image", "audio"), keep, strict=True):
        found = getattr(output, f"{name}_embeds")
        if kept and "embeds" in expected:
            same(found, expected["embeds"][name][rows], f"{name} embedding")
        else:
            assert found is None


def compare_padded_and_unpadded(exported, keep):
    """The whole batch with its masks, and each row without padding."""
    expected = ours(exported, keep)
    with torch.no_grad():
        output = exported.model(**tensors_of(exported.batch, keep), output_hidden_states=True)
        compare(output, exported, expected, keep)
        for row in range(B):
            output = exported.model(**tensors_of(exported.batch, keep, row), output_hidden_states=True)
            assert output.attention_mask.all()
            compare(output, exported, expected, keep, slice(row, row + 1))


@on_every_variant("post-norm, float32")
@pytest.mark.parametrize("keep", SUBSETS, ids=lambda keep: "".join(np.array(list("TIA"))[list(keep)]))
def test_outputs_agree_for_every_subset_padded_and_unpadded(both, keep):  # noqa: F811
    compare_padded_and_unpadded(both, keep)


def test_rows_may_lack_different_modalities(both):  # noqa: F811
    keep = np.array([[True, False, True], [False, True, True], [True, True, False]])
    expected = ours(both, keep)
    absent = dict(zip(("text_valid", "region_valid", "audio_valid"), keep, strict=True))
    shown = both.batch | {name: both.batch[name] & kept[:, None] for name, kept in absent.items()}
    with torch.no_grad():
        output = both.model(**tensors_of(shown, (True, True, True)), output_hidden_states=True)
    assert all(torch.isfinite(state).all() for state in output.hidden_states)
    same(output.last_hidden_state[output.attention_mask], expected["memory"][expected["valid"]], "memory")
    same(output.matching_logits, expected["matching_logits"], "matching")
    same(output.logits, expected["logits"], "class logits")
    same(output.text_logits, expected["text"], "text")


@on_every_variant("post-norm", "pre-norm aligned, float32", "post-norm, float32")
def test_generation_agrees_for_every_subset_padded_and_unpadded(both):  # noqa: F811
    """Greedy, by two beam searches, and the most likely codes."""
    ends = dict(end_id=TOKENS.sep_id, pad_id=TOKENS.pad_id)
    searches = (dict(beams=1), dict(beams=3), dict(beams=4, length_penalty=0.3))
    row, texts, drawn = 1, set(), set()

    def write(params, memory, valid):
        found = [
            generate_text(both.network, params, memory, valid, max_length=T, **ends, **options)
            for options in searches
        ]
        key = jax.random.key(0)
        return [*found, generate_image_codes(both.network, params, memory, valid, key, top_k=1)]

    write = jax.jit(write, compiler_options=COMPILE_QUICKLY)
    for keep in SUBSETS:
        expected = ours(both, keep)
        with jax.enable_x64(both.dtype == "float64"):
            expected = jax.device_get(write(both.params, expected["memory"], expected["valid"]))
        for rows, one in ((slice(None), None), (slice(row, row + 1), row)):
            with torch.no_grad():
                output = both.model(**tensors_of(both.batch, keep, one))
            found = []
            for options in searches:
                options = {"num_beams" if name == "beams" else name: x for name, x in options.items()}
                found.append(both.model.generate_text(output, max_length=T, **options))
            found.append(both.model.generate_image_codes(output, top_k=1))
            for (ids, score), (wanted, log_probability) in zip(found, expected, strict=True):
                np.testing.assert_array_equal(ids.numpy(), wanted[rows], err_msg=str(keep))
                same(score, log_probability[rows], f"log-probability {keep}")
            texts |= {tuple(ids) for written, _ in found[:3] for ids in written.tolist()}
            drawn |= {tuple(codes) for codes in found[3][0].tolist()}
    assert len({TOKENS.sep_id in ids for ids in texts}) == 2 and len(texts) > 3 * B and len(drawn) > B


def test_guided_codes_agree(both):  # noqa: F811
    """A row alone, and padded ones; `gumbel` is the noise of `jax.random`, checked elsewhere."""
    batch, key, found = both.batch, jax.random.key(3), {}
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
    batch, keep = both.batch, (False, True, False)
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


# A loss that reaches every parameter: what is trained there (text, picture), and whatever else is computed.
DRAWN = np.random.default_rng(5).normal(size=(B, 16))
TARGETS = (DRAWN > 0.5).astype(int)


def loss_here(network, params, classes, batch, keep):
    """Cross-entropy of text and codes; binary cross-entropy of matching and of the classes; mean squares of
    the other heads; the embeddings of what is shown, [3, B, 1] `keep`, over the temperature."""

    def apply(method, *args):
        return network.apply({"params": params}, *args, method=method)

    states, valid = apply("align", inputs_of(batch, keep))
    memory = apply("fuse", states, valid, LENGTHS)
    text = apply("text_logits", batch["labels"], apply("text_memory", memory), valid)
    image = apply("image_logits", batch["codes"], apply("image_memory", memory), valid)
    losses = [cross_entropy(text, batch["labels"], batch["labels"] != TOKENS.pad_id)]
    losses.append(cross_entropy(image, batch["codes"], batch["codes"] >= 0))
    for logits in (apply("matching_logits", memory), class_logits(classes, memory, valid, LENGTHS)):
        each = jax.nn.softplus(logits) - logits * TARGETS[:, : logits.shape[1]]
        losses.append((each.sum(), each.size))
    for name in HEADS:
        squares = jnp.square(apply(name, memory)).mean(-1)
        losses.append(((squares * valid).sum(), valid.sum()))
    total = sum(value / count for value, count in losses)
    if network.config["num_alignment_layers"]:
        embeds = apply("embeddings", states, valid, LENGTHS)
        shown = zip(embeds.values(), keep, strict=True)
        parts = [(x * (DRAWN[:, : x.shape[1]] * kept).astype(x.dtype)).sum() for x, kept in shown]
        total += sum(parts) / apply("temperature")
    return total


def loss_there(model, batch, keep):
    tensors = tensors_of(batch, keep)
    tensors["labels"][tensors["labels"] == TOKENS.pad_id] = -100
    output = model(**tensors)
    loss, memory = output.loss, output.last_hidden_state[output.attention_mask]
    for logits in (output.matching_logits, output.logits):
        targets = torch.from_numpy(TARGETS[:, : logits.shape[1]]).to(logits.dtype)
        loss = loss + torch.nn.functional.binary_cross_entropy_with_logits(logits, targets)
    loss = loss + sum(getattr(model, name)(memory).square().mean() for name in HEADS)
    shown = [output.text_embeds, output.image_embeds, output.audio_embeds]
    shown = [(x * torch.from_numpy(DRAWN[:, : x.shape[1]]).to(x.dtype)).sum() for x in shown if x is not None]
    return loss + sum(shown) / model.encoder.temperature() if shown else loss


@on_every_variant("pre-norm aligned", "post-norm", "post-norm, float32")
def test_gradients_of_every_parameter_and_a_step_along_them_agree(both):  # noqa: F811
    config = json.loads((both.folder / "config.json").read_text())
    lines, shapes = conversion.table(config), conversion.shapes(config)
    before = {name: x.clone() for name, x in both.model.state_dict().items()}

    def here(parameters, keep):
        return loss_here(both.network, *parameters, both.batch, keep)

    with jax.enable_x64(both.dtype == "float64"):
        run = jax.jit(jax.value_and_grad(here), compiler_options=COMPILE_QUICKLY)
    for keep in ((True, True, True), (False, True, True), (True, False, False)):
        with jax.enable_x64(both.dtype == "float64"):
            parameters = (both.params, both.classes)
            loss, gradients = jax.device_get(run(parameters, of_rows(keep)))
            stepped = jax.tree.map(lambda x, gradient: x - RATE * gradient, parameters, gradients)
            loss_after = jax.device_get(run(stepped, of_rows(keep))[0])
        assert abs(loss_after - loss) > 1e-3
        gradients = {
            path_name(path): x
            for path, x in jax.tree_util.tree_flatten_with_path(gradients[0] | {"classes": gradients[1]})[0]
        }
        found = loss_there(both.model, both.batch, keep)
        same(found, loss, "loss")
        both.model.zero_grad()
        found.backward()
        tensors, still = dict(both.model.named_parameters()), set()
        for name, line, index in tensors_of_lines(lines, shapes):
            expected = line.layout.to_tensor(gradients[line.path][index])
            found = tensors[name].grad
            same(torch.zeros_like(tensors[name]) if found is None else found, expected, name, least=-1)
            still |= {name} if np.abs(expected).max() < 1e-4 else set()
        # The same for all keys, a key's bias changes nothing.
        assert not all(keep) or all(name.endswith(".key.bias") for name in still), still
        torch.optim.SGD(both.model.parameters(), lr=RATE).step()
        with torch.no_grad():
            same(loss_there(both.model, both.batch, keep), loss_after, "loss after a step")
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


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_base_model_agrees(dtype, tmp_path):
    """With the weights of its initialisation, and the sizes that the paper's encoders give the data."""
    config = load(ROOT / "configs" / "pretrain.py", "base").model.to_dict() | {"dtype": dtype}
    encoders = dict(region_size=2048, audio_size=4 * 768, num_region_classes=1600)
    sizes = Sizes(vocab_size=30_522, num_codes=8192, codes_per_image=64, **encoders)
    network = OPT(config, sizes)
    with jax.enable_x64(dtype == "float64"):
        smallest = conversion.smallest_batch(sizes)
        init = jax.jit(lambda: unbox(network.init(jax.random.key(0), *smallest)["params"]))
        params = jax.tree.map(lambda leaf: np.asarray(leaf, dtype), jax.device_get(init()))
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) > 238e6
        both = exported_both(network, params, tmp_path / "folder")
    for keep in SUBSETS:
        compare_padded_and_unpadded(both, keep)
