"""Weights that were trained, exported: from the features of the cache on, and from pictures, texts and
recordings on."""

import itertools
import os
from pathlib import Path

import jax
import numpy as np
import pytest

from opt_jax.answers import pretrained_answers
from opt_jax.cache import FeatureCache
from opt_jax.convert.__main__ import main
from opt_jax.convert.export import load, write_folder
from opt_jax.data.spoken_scenes import SpokenScenes
from opt_jax.data.triplet import Triplet
from opt_jax.evaluation.scorers import Model
from opt_jax.models.inputs import uncorrupted
from opt_jax.models.opt import lengths_of
from opt_jax.pipeline import make_loader
from opt_jax.trained import load_trained

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from exported_toy import HEADS, same  # noqa: E402

from opt_jax.export.modeling_opt_jax import OptJaxModel  # noqa: E402
from opt_jax.export.processing_opt_jax import OptJaxProcessor  # noqa: E402

ROWS = 4
REAL = "OPT_JAX_TINY"  # names the working directory of a real training, such as runs/tiny
SUBSETS = [keep for keep in itertools.product([True, False], repeat=3) if any(keep)]
FIELDS = {
    "text": {"text_ids": "input_ids", "text_valid": "attention_mask"},
    "image": {
        "region_features": "region_features",
        "region_boxes": "region_boxes",
        "region_valid": "region_attention_mask",
    },
    "audio": {"audio_features": "audio_features", "audio_valid": "audio_attention_mask"},
}


def first_test_rows(prepared):
    """A batch of the cache of the test split, in float32."""
    cache = FeatureCache(prepared.workdir / "cache" / "test" / "features")
    loader = make_loader(prepared.config, cache, prepared.settings["max_regions"], whole=True)
    (batch,) = loader.evaluation_batches(range(ROWS), ROWS, loader.config.buckets[-1])
    narrow = {name for name, x in batch.items() if np.issubdtype(x.dtype, np.floating)}
    return {name: np.asarray(x, np.float32) if name in narrow else np.asarray(x) for name, x in batch.items()}


def there(batch, keep):
    """Inputs of the PyTorch model."""
    names = {
        ours: theirs
        for fields, kept in zip(FIELDS.values(), keep, strict=True)
        for ours, theirs in fields.items()
        if kept
    }
    return {theirs: torch.from_numpy(np.array(batch[ours])) for ours, theirs in names.items()}


def networks_agree(workdir, tmp_path):
    """Hidden states, heads, scores and logits for every set of modalities."""
    exported = load(workdir)
    write_folder(exported, tmp_path / "out")
    card, evaluated = (tmp_path / "out" / "README.md").read_text(), (workdir / "results.json").is_file()
    assert ("not evaluated" in card) != evaluated and ("Word error rate" in card) == evaluated
    model, batch = OptJaxModel.from_pretrained(tmp_path / "out"), first_test_rows(exported.preparation)
    ours = Model(exported.network, exported.params, exported.statistics)
    symbols, codes = batch["text_ids"][:, 1:], batch["image_codes"]
    decoded = {"labels": torch.from_numpy(symbols).long(), "image_codes": torch.from_numpy(codes).long()}

    @jax.jit
    def here(params, batch, keep):
        inputs = uncorrupted(ours.standardise(batch), keep)
        memory, valid = ours.apply(params, "encode", inputs)
        found = {name: ours.apply(params, name, memory) for name in (*HEADS, "matching_logits")}
        for name, shown in (("text", symbols), ("image", codes)):
            kept = ours.apply(params, f"{name}_memory", memory)
            found[name] = ours.apply(params, f"{name}_logits", shown, kept, valid)
        units = ours.apply(params, "embeddings", *ours.apply(params, "align", inputs), lengths_of(inputs))
        return found | {"memory": memory, "valid": valid, "units": units}

    for keep in SUBSETS:
        expected = jax.device_get(here(ours.params, batch, np.array(keep)))
        with torch.no_grad():
            output = model(**there(batch, keep), **decoded)
        memory, valid = output.last_hidden_state[output.attention_mask], expected["valid"]
        same(memory, expected["memory"][valid], f"memory {keep}")
        for name in HEADS:
            same(getattr(model, name)(memory).detach(), expected[name][valid], f"{name} {keep}")
        same(output.matching_logits, expected["matching_logits"], f"matching {keep}")
        same(output.text_logits, expected["text"], f"text {keep}")
        same(output.image_logits, expected["image"], f"image {keep}")
        for name, kept in zip(FIELDS, keep, strict=True):
            if kept:
                same(output[f"{name}_embeds"], expected["units"][name], f"{name} embedding {keep}")


def answers_agree(workdir, tmp_path):
    """Features, captions, transcripts, matching scores and pictures of raw test samples."""
    main(["export", f"--checkpoint={workdir}", f"--out={tmp_path / 'out'}"])
    trained, model = load_trained(workdir), OptJaxModel.from_pretrained(tmp_path / "out")
    processor = OptJaxProcessor.from_pretrained(tmp_path / "out")
    samples, differ = SpokenScenes(trained.directory / "data", "test"), []
    for row in range(ROWS):
        sample = samples[row]
        shown, text = Triplet("input", image=sample.image, audio=sample.audio), sample.caption
        expected = pretrained_answers(trained, shown, [text])
        assert processor.caption(model, sample.image) == expected["caption"]
        assert processor.transcribe(model, sample.audio, sample.image) == expected["transcript"]
        batch, inputs = trained.batch([shown]), processor(image=sample.image, audio=sample.audio)
        boxes = batch["region_boxes"][0][batch["region_valid"][0]]
        np.testing.assert_allclose(inputs["region_boxes"][0], boxes, rtol=0, atol=1e-5)
        for name in ("region", "audio"):
            ours = batch[f"{name}_features"][0][batch[f"{name}_valid"][0]].astype(np.float32)
            theirs = inputs[f"{name}_features"][0].numpy()
            # Rounded to 16 bits: what lies between two of them may become either.
            np.testing.assert_allclose(theirs, ours, rtol=2e-3, atol=1e-5, err_msg=name)
            assert (theirs == ours).mean() > 0.98, name
        with torch.no_grad():
            logits = model(**processor(text=text, image=sample.image)).matching_logits[0]
        (match,) = [said["match"] for said in expected["texts"] if said["with"] == "image"]
        np.testing.assert_allclose((logits[3] - logits[4]).sigmoid(), match, rtol=0, atol=1e-3)
        for given, asked in (({"text": text}, [text]), ({"audio": sample.audio}, [])):
            triplet = Triplet("input", audio=given.get("audio"))
            picture = pretrained_answers(trained, triplet, asked, seed=row)["picture"]
            drawn = np.asarray(processor.draw(model, **given, seed=row), int)
            differ.append(np.abs(drawn - picture).max())
    assert max(differ) <= 1  # of 255, a rounding
    print(f"{sum(change == 0 for change in differ)} of {len(differ)} pictures are the same to the last bit")


def test_the_network_agrees_on_trained_weights(pretrained, tmp_path):
    networks_agree(pretrained, tmp_path)


@pytest.mark.slow
def test_raw_inputs_are_answered_alike_on_trained_weights(pretrained, tmp_path):
    answers_agree(pretrained, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(REAL not in os.environ, reason=f"{REAL} names no working directory of a pre-training")
@pytest.mark.parametrize("agree", [networks_agree, answers_agree])
def test_a_real_training_agrees(agree, tmp_path):
    agree(Path(os.environ[REAL]), tmp_path)
