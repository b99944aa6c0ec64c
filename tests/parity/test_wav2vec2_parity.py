"""wav2vec 2.0 against transformers' PyTorch models in float64, with the same random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from configs.encoders.wav2vec2 import get_config
from opt_jax.convert.table import convert
from opt_jax.convert.wav2vec2 import rows, shapes
from opt_jax.encoders import wav2vec2_objectives as objectives
from opt_jax.encoders.wav2vec2 import Wav2Vec2, Wav2Vec2ForCTC, frame_count, normalize_waveforms
from opt_jax.encoders.wav2vec2_quantizer import Wav2Vec2ForPretraining

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-9
LENGTHS = (2600, 1900)


def converted(arrays: dict, ours) -> dict:
    """Arrays by published name -> nested parameters here, by the table that the converter uses."""
    return unflatten_dict(convert(arrays, rows(ours), shapes(ours, arrays), "the reference"), sep="/")


def configurations(kind: str):
    """Tiny (ours, theirs) of the shape of the base or the large model."""
    ours = get_config(kind)
    ours.model.update(
        dict(conv_dim=(6,) * 7, hidden_size=12, num_layers=2, num_heads=3, intermediate_size=20)
    )
    ours.model.update(dict(position_kernel=8 if kind == "base" else 5, position_groups=4, hidden_dropout=0.0))
    ours.model.update(dict(attention_dropout=0.0, layerdrop=0.0, vocabulary=tuple("_|abcd")))
    ours.ssl.update(dict(codebook_size=5, codevector_dim=8, projection_dim=7, feature_dropout=0.0))
    model, ssl = ours.model, ours.ssl
    theirs = transformers.Wav2Vec2Config(
        vocab_size=6,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=20,
        conv_dim=list(model.conv_dim),
        conv_bias=model.conv_bias,
        feat_extract_norm=model.feature_norm,
        do_stable_layer_norm=model.stable_layer_norm,
        num_conv_pos_embeddings=model.position_kernel,
        num_conv_pos_embedding_groups=4,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        feat_proj_dropout=0.0,
        final_dropout=0.0,
        layerdrop=0.0,
        apply_spec_augment=True,
        mask_time_prob=0.05,
        num_codevectors_per_group=5,
        num_codevector_groups=2,
        codevector_dim=8,
        proj_codevector_dim=7,
        contrastive_logits_temperature=0.1,
        diversity_loss_weight=ssl.diversity_weight,
        feat_quantizer_dropout=0.0,
        pad_token_id=0,
        attn_implementation="eager",
    )
    return ours, theirs


def reference(kind: str, architecture: str):
    """(our configuration, torch model in float64 with every parameter randomised, our parameters)."""
    ours, theirs = configurations(kind)
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(theirs).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm.weight" in name or name.endswith("original0") else 0.0
            parameter.copy_(centre + 0.3 * torch.randn_like(parameter))
    return (
        ours,
        model,
        converted({name: p.detach().numpy() for name, p in model.named_parameters()}, ours),
    )


def clips():
    """Raw (waveforms [2, N], lengths), and the clips normalised one by one in numpy."""
    rng = np.random.default_rng(0)
    rows = [rng.standard_normal(n) * 3 + 1 for n in LENGTHS]
    waveforms = np.zeros((2, LENGTHS[0]))
    for row, clip in enumerate(rows):
        waveforms[row, : len(clip)] = clip
    return waveforms, np.array(LENGTHS), [(c - c.mean()) / np.sqrt(c.var() + 1e-7) for c in rows]


def assert_close(found, expected):
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape and found.dtype == np.float64
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("kind", ["base", "large"])
def test_hidden_states_of_a_padded_batch_are_those_of_each_clip_alone(kind):
    ours, model, params = reference(kind, "Wav2Vec2ForCTC")
    waveforms, lengths, rows = clips()
    normalized = normalize_waveforms(jnp.asarray(waveforms), lengths)
    output = jax.jit(Wav2Vec2(ours.model).apply)({"params": params["wav2vec2"]}, normalized, lengths)
    for row, clip in enumerate(rows):
        assert_close(normalized[row, : len(clip)], clip)
        with torch.no_grad():
            expected = model.wav2vec2(torch.tensor(clip)[None], output_hidden_states=True)
        frames = expected.last_hidden_state.shape[1]
        assert int(output.frame_valid[row].sum()) == frames == frame_count(len(clip), ours.model)
        assert_close(output.normalized_features[row, :frames], expected.extract_features[0])
        assert len(expected.hidden_states) == len(output.hidden_states) == 3
        for found, theirs in zip(output.hidden_states, expected.hidden_states, strict=True):
            assert_close(found[row, :frames], theirs[0])
        assert_close(output.last_hidden_state[row, :frames], expected.last_hidden_state[0])


def test_padded_batch_of_the_layer_norm_variant():
    ours, model, params = reference("large", "Wav2Vec2ForCTC")
    waveforms, lengths, _ = clips()
    mask = torch.arange(waveforms.shape[1])[None] < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        expected = model.wav2vec2(torch.tensor(waveforms), attention_mask=mask.long()).last_hidden_state
    output = jax.jit(Wav2Vec2(ours.model).apply)({"params": params["wav2vec2"]}, waveforms, lengths)
    valid = np.asarray(output.frame_valid)
    assert_close(output.last_hidden_state[valid], expected.numpy()[valid])


@pytest.mark.parametrize("kind", ["base", "large"])
def test_ctc_logits_loss_and_gradients(kind):
    ours, model, params = reference(kind, "Wav2Vec2ForCTC")
    clip = clips()[2][0]
    labels = np.array([[2, 3, 3]])
    logits = model(torch.tensor(clip)[None]).logits
    loss = torch.nn.functional.ctc_loss(
        logits.log_softmax(-1).transpose(0, 1),
        torch.tensor(labels),
        torch.tensor([logits.shape[1]]),
        torch.tensor([3]),
        reduction="sum",
    )
    loss.backward()

    def ours_of(params):
        found, valid = Wav2Vec2ForCTC(ours.model).apply({"params": params}, clip[None], np.array([len(clip)]))
        return objectives.ctc_terms(found, valid, labels, np.array([3]))["ctc"][0], found

    (total, found), gradients = jax.jit(jax.value_and_grad(ours_of, has_aux=True))(params)
    assert_close(found, logits.detach())
    assert_close(total, loss.detach())
    expected = converted(
        {
            name: np.zeros(p.shape) if p.grad is None else p.grad.numpy()
            for name, p in model.named_parameters()
        },
        ours,
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9 * float(total)), gradients, expected
    )


@pytest.mark.parametrize("kind", ["base", "large"])
def test_pretraining_loss_with_the_same_mask_and_negatives(kind, monkeypatch):
    ours, model, params = reference(kind, "Wav2Vec2ForPreTraining")
    clip = clips()[2][0][None]
    frames = frame_count(clip.shape[1], ours.model)
    mask = objectives.span_mask(jax.random.key(0), jnp.ones((1, frames), bool), 0.65, 2)
    negatives = objectives.sample_negatives(jax.random.key(1), mask, 4)
    monkeypatch.setattr(
        torch.Tensor, "float", lambda self: self
    )  # transformers takes the cross-entropy in float32
    with torch.no_grad():
        expected = model(
            torch.tensor(clip),
            mask_time_indices=torch.tensor(np.asarray(mask)),
            sampled_negative_indices=torch.tensor(np.asarray(negatives)),
        )
    forward = jax.jit(Wav2Vec2ForPretraining(ours.model, ours.ssl).apply)
    output = forward({"params": params}, clip, np.array([clip.shape[1]]), mask)
    assert_close(output.context, expected.projected_states)
    assert_close(output.targets, expected.projected_quantized_states)
    terms = objectives.contrastive_terms(
        output.context, output.targets, output.quantized.codes, mask, negatives, ours.ssl.contrast_temperature
    )
    chosen = jax.nn.one_hot(output.quantized.codes, 5, dtype=jnp.float64)
    assert_close(terms["contrast"][0], expected.contrastive_loss)
    assert_close(objectives.code_perplexity(chosen, mask).sum(), expected.codevector_perplexity)
    assert_close(objectives.diversity_terms(chosen, mask)[0], expected.diversity_loss)
