"""The command, from published files to the frozen encoder that the cache uses."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict

from opt_jax.convert.__main__ import main
from opt_jax.encoders import dvae
from opt_jax.encoders.frozen import load_frozen
from opt_jax.encoders.wav2vec2_extraction import Extractor

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
LETTERS = {"<pad>": 0, "|": 1, "A": 2, "B": 3}


def published(directory, architecture, **changes):
    """A small random checkpoint as transformers writes it; returns the model."""
    settings = dict(
        vocab_size=4, hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20,
        conv_dim=[6] * 7, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4, layerdrop=0.0,
        num_codevectors_per_group=5, codevector_dim=8, proj_codevector_dim=7,
    )  # fmt: skip
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(**settings | changes)
    model = getattr(transformers, architecture)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    model.save_pretrained(directory)
    (directory / "vocab.json").write_text(json.dumps(LETTERS))
    return model


def clip():
    samples = np.random.default_rng(0).normal(size=3000).astype(np.float32)
    return samples, torch.from_numpy((samples - samples.mean()) / np.sqrt(samples.var() + 1e-7))[None]


@pytest.mark.parametrize(
    "changes",
    [{}, dict(feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True)],
    ids=["base", "large"],
)
def test_a_ctc_checkpoint_gives_the_same_features_and_letters(tmp_path, changes, capsys):
    model = published(tmp_path / "in", "Wav2Vec2ForCTC", **changes)
    main(["import", "--kind=wav2vec2", f"--source={tmp_path / 'in'}", f"--out={tmp_path / 'out'}"])
    assert "wav2vec2/layers/attention/query_kernel" in capsys.readouterr().out
    params, config = load_frozen(tmp_path / "out")
    assert config["vocabulary"] == list(LETTERS)
    extractor, (samples, normalised) = Extractor(params, ConfigDict(config)), clip()
    features, counts = extractor.extract(samples[None], np.array([3000]))
    logits, _ = extractor.logits(samples[None], np.array([3000]))
    with torch.no_grad():
        expected = model(normalised).logits[0]
        context = model.wav2vec2(normalised).last_hidden_state[0]
    frames = len(expected)
    assert counts.tolist() == [frames]
    np.testing.assert_allclose(logits[0, :frames], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(features[0, :frames], context, rtol=1e-4, atol=1e-5)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert len(metrics["source_sha256"]["model.safetensors"]) == 64


@pytest.mark.parametrize("architecture", ["Wav2Vec2Model", "Wav2Vec2ForPreTraining"])
def test_other_checkpoints_keep_what_they_have(tmp_path, architecture):
    model = published(tmp_path / "in", architecture)
    main(["import", "--kind=wav2vec2", f"--source={tmp_path / 'in'}", f"--out={tmp_path / 'out'}"])
    params, config = load_frozen(tmp_path / "out")
    more = {"quantizer", "project_context", "project_targets"} if "Pre" in architecture else set()
    assert set(params) == {"wav2vec2"} | more
    extractor, (samples, normalised) = Extractor(params, ConfigDict(config)), clip()
    if not more:
        with pytest.raises(ValueError, match="has no quantizer"):
            extractor.tokens(samples[None], np.array([3000]))
        return
    tokens, counts = extractor.tokens(samples[None], np.array([3000]))
    with torch.no_grad():
        features = model.wav2vec2(normalised).extract_features
        expected = model.quantizer.weight_proj(features).reshape(-1, 2, 5).argmax(-1)
    assert tokens.dtype == np.int32 and len(set(expected.flatten().tolist())) > 1
    np.testing.assert_array_equal(tokens[0, : int(counts[0])], expected)


def test_clips_are_normalised_where_the_preprocessor_says_so(tmp_path):
    model = published(tmp_path / "in", "Wav2Vec2Model")
    (tmp_path / "in" / "preprocessor_config.json").write_text('{"do_normalize": false}')
    main(["import", "--kind=wav2vec2", f"--source={tmp_path / 'in'}", f"--out={tmp_path / 'out'}"])
    params, config = load_frozen(tmp_path / "out")
    samples = clip()[0] * 0.1
    features, _ = Extractor(params, ConfigDict(config)).extract(samples[None], np.array([3000]))
    with torch.no_grad():
        expected = model(torch.from_numpy(samples)[None]).last_hidden_state[0]
    np.testing.assert_allclose(features[0, : len(expected)], expected, rtol=1e-4, atol=1e-5)


def refused(tmp_path, source):
    with pytest.raises(SystemExit) as end:
        main(["import", "--kind=wav2vec2", f"--source={source}", f"--out={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()
    return str(end.value.code)


def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path):
    published(tmp_path / "in", "Wav2Vec2ForCTC")
    path = tmp_path / "in" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"num_hidden_layers": 1}))
    told = refused(tmp_path, tmp_path / "in")
    assert "differences" in told and "layers.1.attention.k_proj.bias [12] is beyond" in told
    path.write_text(json.dumps(config | {"model_type": "hubert"}))
    assert "model_type is 'hubert', expected 'wav2vec2'" in refused(tmp_path, tmp_path / "in")
    path.write_text(json.dumps(config))
    (tmp_path / "in" / "vocab.json").unlink()
    assert "vocab.json is missing" in refused(tmp_path, tmp_path / "in")
    assert "no such file or folder" in refused(tmp_path, tmp_path / "nowhere")
    (tmp_path / "there").mkdir()
    with pytest.raises(SystemExit, match="there exists"):
        main(["import", "--kind=wav2vec2", f"--source={tmp_path / 'in'}", f"--out={tmp_path / 'there'}"])


def test_the_discrete_vae(tmp_path):
    dall_e = pytest.importorskip("dall_e", reason="needs `pip install --no-deps dall-e attrs`")
    torch.manual_seed(0)
    sizes = dict(n_hid=64, n_blk_per_group=1, vocab_size=512)
    modules = {"encoder": dall_e.Encoder(**sizes), "decoder": dall_e.Decoder(n_init=16, **sizes)}
    for name, module in modules.items():
        with torch.no_grad():
            for key, parameter in module.named_parameters():
                if key.endswith("b"):
                    parameter.normal_(std=0.1)
        torch.save(module, tmp_path / f"{name}.pkl")
    main(["import", "--kind=dvae", f"--source={tmp_path}", f"--out={tmp_path / 'out'}"])
    params, config = load_frozen(tmp_path / "out")
    assert config["code_grid"] == [8, 8] and config["vocab_size"] == 512

    pictures = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    codes = np.asarray(dvae.encode(params, pictures))
    pixels = dall_e.map_pixels(torch.from_numpy(pictures.transpose(0, 3, 1, 2).astype(np.float32) / 255))
    with torch.no_grad():
        expected = modules["encoder"](pixels).argmax(1).reshape(2, 64).numpy()
    assert (codes.reshape(2, 64) == expected).mean() > 0.98  # a tie in float32 may go either way
