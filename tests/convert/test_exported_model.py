"""The exported model as PyTorch trains and asks it: losses, options, half precision, what is saved."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from opt_jax.convert.export import CLASSES
from opt_jax.export import MODELING_FILES

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from transformers import AutoModel  # noqa: E402

from opt_jax.export.configuration_opt_jax import OptJaxConfig  # noqa: E402
from opt_jax.export.modeling_opt_jax import OptJaxModel  # noqa: E402

CODE = Path(__file__).parents[2] / "opt_jax" / "export"
B, W, F = 3, 17, 6
DECODER = dict(num_layers=1, num_heads=2, mlp_size=12)


def make_model(**changes):
    torch.manual_seed(0)
    sizes = dict(vocab_size=W, region_size=F, audio_size=5, num_region_classes=4, num_codes=9)
    sizes |= dict(hidden_size=8, num_layers=3, num_heads=2, mlp_size=16, codes_per_image=4, alignment_size=6)
    sizes |= dict(num_alignment_layers=2, max_text_positions=7, max_audio_positions=7, initializer_range=0.3)
    sizes |= dict(text_decoder=DECODER, image_decoder=DECODER, auto_map=CLASSES)
    sizes |= dict(cls_token_id=2, sep_token_id=3, mask_token_id=4)
    return OptJaxModel(OptJaxConfig(**sizes | changes)).eval()


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, W, (B, 5), generator=generator)
    ids[:, 0] = 2
    boxes, regions = torch.rand(B, 4, 7, generator=generator), torch.randn(B, 4, F, generator=generator)
    return {"input_ids": ids, "region_features": regions, "region_boxes": boxes}


def test_classes_are_trained_by_the_loss_of_those_here(inputs):
    model = make_model(num_classes=4)
    labels = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [0, 0.3, 0, 0]])  # nobody labelled the second row
    output = model(**inputs, class_labels=labels)
    x, t = output.logits.detach().numpy(), labels.numpy()
    each = (np.logaddexp(0, x) - x * t).sum(1)
    np.testing.assert_allclose(output.loss.item(), (each[0] + each[2]) / 2, rtol=1e-6)
    text = {"labels": torch.tensor([[7, 8, 3]] * B)}
    both = model(**inputs, **text, class_labels=labels.bool()).loss
    alone = model(**inputs, class_labels=labels.bool()).loss
    np.testing.assert_allclose((both - alone).item(), model(**inputs, **text).loss.item(), rtol=1e-5)
    output.loss.backward()
    assert model.classifier.weight.grad.abs().max() > 0 and model.embedder.words.weight.grad.abs().max() > 0
    assert model(**inputs, class_labels=0 * labels).loss == 0


def test_a_folder_gets_a_fresh_classifier(model, inputs, tmp_path):
    model.save_pretrained(tmp_path / "folder")
    names = dict(enumerate("abcde"))
    found = OptJaxModel.from_pretrained(tmp_path / "folder", num_labels=5, id2label=names)
    assert (found.config.num_labels, found.config.num_classes, found.config.id2label) == (5, 5, names)
    assert found(**inputs).logits.shape == (B, 5)
    # A label in five is likely from the start, as in `opt_jax.tasks.classification`.
    torch.testing.assert_close(found.classifier.bias.detach(), torch.full((5,), -math.log(4)))
    found.save_pretrained(tmp_path / "tuned")
    again = OptJaxModel.from_pretrained(tmp_path / "tuned")
    assert torch.equal(again.classifier.weight, found.classifier.weight) and again.config.id2label == names
    assert model.config.num_labels == 0 and model(**inputs).logits is None


@pytest.mark.parametrize(
    "targets, told",
    [
        ({"labels": torch.ones(B)}, r"labels are \[3\], expected \[3, N\] with N from 1 to 7"),
        ({"labels": torch.ones(1, 4)}, r"labels are \[1, 4\], expected \[3, N\]"),
        ({"labels": torch.ones(B, 8)}, r"labels are \[3, 8\], .* 1 to 7"),
        ({"image_codes": torch.ones(B, 5)}, r"image_codes are \[3, 5\], .* 1 to 4"),
        ({"image_codes": torch.full((B, 4), -100)}, "image_codes are -100 everywhere"),
        ({"class_labels": torch.ones(B)}, r"class_labels are \[3\], expected \[3, 2\]: 1 for each"),
    ],
)
def test_targets_of_another_shape_are_refused(inputs, targets, told):
    with pytest.raises(ValueError, match=told):
        make_model(num_classes=2)(**inputs, **targets)


def test_classes_without_a_classifier_are_refused(model, inputs):
    with pytest.raises(ValueError, match="load the model with num_labels="):
        model(**inputs, class_labels=torch.zeros(B, 2))


def test_generate_gives_the_ids_of_generate_text(model, inputs):
    with torch.no_grad():
        output = model(**inputs)
    for options in ({}, dict(num_beams=3, length_penalty=0.3, max_length=5), dict(do_sample=True, top_k=4)):
        sampled = "do_sample" in options
        seeds = [{"generator": torch.Generator().manual_seed(3)} if sampled else {} for _ in range(2)]
        ids = model.generate(**inputs, **options, **seeds[0])
        assert torch.equal(ids, model.generate_text(output, **options, **seeds[1])[0])
        assert ids.shape == (B, options.get("max_length", 7))


@pytest.mark.parametrize(
    "options, told",
    [
        (dict(temperature=0.5, top_k=3), "temperature, top_k: of no effect without do_sample=True"),
        (dict(do_sample=True, num_beams=2), "num_beams: of no effect with do_sample=True"),
        (dict(length_penalty=0.5), "length_penalty: of no effect without several num_beams"),
        (dict(do_sample=True, length_penalty=0.5), "length_penalty: of no effect"),
        (dict(max_length=8), "max_length is 8; the model has positions for 7"),
    ],
)
def test_options_without_effect_are_refused_before_anything_is_decoded(model, options, told, monkeypatch):
    output = model(input_ids=torch.tensor([[2, 7]]))
    monkeypatch.setattr(model, "stepper", lambda *_: pytest.fail("decodes"))
    with pytest.raises(ValueError, match=told):
        model.generate_text(output, **options)


def test_unknown_options_are_refused(model):
    output = model(input_ids=torch.tensor([[2, 7]]))
    with pytest.raises(TypeError, match="max_new_tokens"):
        model.generate(input_ids=torch.tensor([[2, 7]]), max_new_tokens=5)
    with pytest.raises(ValueError, match="generator: of no effect beside noise"):
        model.generate_image_codes(output, generator=torch.Generator(), noise=lambda step, shape: None)


def test_the_configuration_says_what_comes_back(model):
    inputs = {"input_ids": torch.tensor([[2, 7]])}
    assert model(**inputs).hidden_states is None
    model.config.output_hidden_states = True
    assert len(model(**inputs).hidden_states) == 4
    assert model(**inputs, output_hidden_states=False).hidden_states is None
    model.config.return_dict = False
    assert isinstance(model(**inputs), tuple)
    assert model(**inputs, return_dict=True).matching_logits.shape == (1, 5)


def test_gradients_are_the_same_where_layers_are_computed_again(model, inputs):
    """With dropout, which then has to be the same in both passes."""
    targets, calls, gradients = {"labels": torch.tensor([[7, 8, 3]] * B)}, [], []
    model.train()
    for module in (model.encoder.layers[2].mlp_in, model.text_decoder.layers[0].mlp_in):
        module.register_forward_hook(lambda *_: calls.append(1))
    for checkpointed, expected in ((False, 2), (True, 4)):
        if checkpointed:
            model.gradient_checkpointing_enable()
        calls.clear()
        torch.manual_seed(5)
        model.zero_grad()
        model(**inputs, **targets).loss.backward()
        assert len(calls) == expected
        gradients.append({name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None})
    assert len(gradients[0]) > 60
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-6, msg=name)


def test_what_a_folder_lacks_is_fresh(model, tmp_path):
    lacks = ("deviation", "region_mean", "log_temperature", "output_bias", "word_bias", "image_decoder.start")
    kept = {name: x for name, x in model.state_dict().items() if not any(part in name for part in lacks)}
    model.save_pretrained(tmp_path, state_dict=kept)
    found = OptJaxModel.from_pretrained(tmp_path)
    for name, value in (("region_mean", 0), ("region_deviation", 1), ("audio_deviation", 1)):
        assert (getattr(found.embedder, name) == value).all()
    assert (found.text_decoder.output_bias == 0).all() and (found.heads.word_bias == 0).all()
    torch.testing.assert_close(found.encoder.log_temperature.item(), math.log(0.07))
    assert 0.05 < found.image_decoder.start.weight.std() < 1
    assert torch.equal(found.embedder.words.weight, model.embedder.words.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_neither_statistics_nor_losses(dtype, model, inputs, tmp_path):
    with torch.no_grad():
        model.embedder.region_mean += 1000.1
    model.save_pretrained(tmp_path)
    half = OptJaxModel.from_pretrained(tmp_path, dtype=dtype)
    assert half.dtype == half.embedder.words.weight.dtype == dtype
    assert torch.equal(half.embedder.region_mean, model.embedder.region_mean)
    inputs["region_features"] += 1000.1
    labels = torch.tensor([[7, 8, 3, -100]] * B)
    with torch.no_grad():
        found, expected = half(**inputs, labels=labels), model(**inputs, labels=labels)
    assert found.last_hidden_state.dtype == dtype
    for name in ("loss", "matching_logits", "text_logits"):
        assert getattr(found, name).dtype == torch.float32
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=0.05)
    each = torch.log_softmax(found.text_logits, -1).gather(2, labels[:, :3, None])
    torch.testing.assert_close(found.loss, -each.mean(), rtol=1e-6, atol=0)


def test_a_model_saved_alone_is_loaded_by_its_own_files(model, inputs, tmp_path):
    model.save_pretrained(tmp_path / "first")
    for name in MODELING_FILES:
        shutil.copyfile(CODE / name, tmp_path / "first" / name)
    found = AutoModel.from_pretrained(tmp_path / "first", trust_remote_code=True)
    with torch.no_grad():
        found.heads.matching.bias += 1  # tuned
    found.save_pretrained(tmp_path / "second")
    assert {path.name for path in (tmp_path / "second").glob("*.py")} == set(MODELING_FILES)
    shutil.rmtree(tmp_path / "first")
    again = AutoModel.from_pretrained(tmp_path / "second", trust_remote_code=True)
    with torch.no_grad():
        expected = model(**inputs).matching_logits + 1
        torch.testing.assert_close(again(**inputs).matching_logits, expected, rtol=0, atol=1e-6)
