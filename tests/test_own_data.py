"""Pre-training on a manifest at the smallest sizes: gaps, broken files, no speech at all."""

import json
import types

import numpy as np
import pytest
import soundfile
from PIL import Image
from test_pipeline import smallest_config

from opt_jax import pipeline
from opt_jax.cache import CacheError, FeatureCache
from opt_jax.configuration import ConfigError
from opt_jax.data.triplet import SourceError
from opt_jax.evaluation.run import available_modalities
from opt_jax.validation import validate

WORDS = ("red", "blue", "green", "dark", "bright", "small")


def write_split(folder, split, count, *, speech=True, gaps=True):
    """A manifest of `count` usable rows; with `gaps` some lack a modality, and one more is broken."""
    rng, rows = np.random.default_rng(len(split)), []
    (folder / split).mkdir(parents=True)
    for number in range(count):
        name, caption = f"{split}/{number}", " ".join(rng.choice(WORDS, 3))
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8)).save(folder / f"{name}.png")
        row = {"id": name, "caption": caption, "image": f"{name}.png", "labels": [caption.split()[0]]}
        if speech:
            soundfile.write(folder / f"{name}.wav", 0.1 * rng.standard_normal(8000), 8000)
            row["audio"] = f"{name}.wav"
        if gaps and number % 8 == 1:
            del row["image"]
        if gaps and number % 8 == 2:
            row.pop("audio", None)
        if gaps and number % 8 == 3:
            del row["caption"]
        rows.append(row)
    if gaps:
        (folder / split / "broken.png").write_bytes(b"")
        rows.append({"id": "broken", "caption": "a", "image": f"{split}/broken.png"})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{split}.jsonl").write_text(lines)


def config_of(folder, workdir):
    config = smallest_config(workdir, "manifest")
    config.data.manifest = str(folder)
    config.data.copies = 1
    encoders = config.encoders
    for recipe in (encoders.dvae.start, encoders.dvae, encoders.wav2vec2.ssl, encoders.wav2vec2.ctc):
        recipe.train.warmup_steps = 0
    config.loader.update(text_lengths=(16,), audio_lengths=(64,))
    config.evaluation.update(probe_train=16, pool_size=100)
    validate(config, 1)
    return config


@pytest.mark.parametrize("own_encoders", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gaps_and_broken_files_cost_their_rows_only(tmp_path, capsys, pretrained, own_encoders):
    data, workdir = tmp_path / "data", tmp_path / "run"
    for split, count in (("train", 32), ("validation", 12), ("test", 16)):
        write_split(data, split, count)
    config = config_of(data, workdir)
    for name in () if own_encoders else ("dvae", "wav2vec2"):
        config.encoders[name].pretrained = str(pretrained / "encoders" / name)
    results = pipeline.run(config, workdir)
    assert results["triplets/train"] == 32 and results["set_aside/train"] == 1
    assert len(FeatureCache(workdir / "cache/train/features")) == 32 + 28  # 4 have no caption, and no copy
    lines = (workdir / "cache/train/features/quarantine.jsonl").read_text().splitlines()
    line, copy = map(json.loads, lines)
    assert (line["id"], line["source"], line["row"]) == ("broken", "manifest", 32)
    assert (copy["id"], copy["source"], copy["row"]) == ("broken", "manifest", 33 + 28)
    assert "image file is empty" in line["reason"]
    # Of 16 test rows 6 lack something; the others are one pool.
    assert results["retrieval/pool"] == 10
    assert "only 10 test rows have text and image and audio" in capsys.readouterr().out
    for key in ("retrieval/image_to_text/R@1", "speech_recognition/audio_image/WER", "classification/I/mAP"):
        assert np.isfinite(results[key]), key
    assert "encoders/detector/ap50" not in results
    assert "data:image/png;base64" in (workdir / "report.html").read_text()


@pytest.mark.slow
def test_pictures_and_words_alone_are_enough(tmp_path):
    data, workdir = tmp_path / "data", tmp_path / "run"
    for split, count in (("train", 24), ("validation", 12), ("test", 12)):
        write_split(data, split, count, speech=False, gaps=False)
    results = pipeline.run(config_of(data, workdir), workdir)
    assert np.isfinite(results["retrieval/text_to_image/R@1"])
    assert np.isfinite(results["captioning/image/CIDEr"])
    assert not [key for key in results if "audio" in key or "wav2vec2" in key]


def test_too_few_rows_for_a_batch_are_told_before_anything_is_trained(tmp_path):
    for split in ("train", "validation", "test"):
        write_split(tmp_path / "data", split, 6, gaps=False)
    with pytest.raises(SourceError, match="the train split has 6 rows, which do not fill a batch"):
        pipeline.run(config_of(tmp_path / "data", tmp_path / "run"), tmp_path / "run")
    for split, count in (("train", 8), ("validation", 6), ("test", 6)):
        write_split(tmp_path / "more", split, count, gaps=False)
    config = config_of(tmp_path / "more", tmp_path / "run")
    config.train.validate_every = 2
    with pytest.raises(SourceError, match="the validation split has 6 rows, .*validate_every to 0"):
        pipeline.run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "encoders").exists()


def test_a_manifest_that_is_not_named_is_asked_for(tmp_path):
    config = smallest_config(tmp_path, "manifest")
    with pytest.raises(ConfigError, match=r"--config\.data\.manifest=data/mine"):
        validate(config, 1)


@pytest.mark.slow
def test_ready_regions_need_no_pixels(tmp_path):
    data, workdir = tmp_path / "data", tmp_path / "run"
    rng = np.random.default_rng(0)
    (data / "features").mkdir(parents=True)
    for split, count in (("train", 24), ("validation", 12), ("test", 12)):
        rows = [{"id": f"{split}-{i}", "caption": " ".join(rng.choice(WORDS, 3))} for i in range(count)]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for row in rows:
            arrays = dict(feat=rng.standard_normal((5, 7)), pred_boxes=np.tile([1.0, 2, 30, 40], (5, 1)))
            arrays |= dict(scores=np.ones(5), pred_classes=np.arange(5), width=60, height=50)
            np.savez(data / "features" / f"{row['id']}.npz", **arrays)
    config = config_of(f"region_npz:{data}/features,captions={data}/{{split}}.jsonl", workdir)
    config.encoders.regions = "ready"
    config.encoders.ready.update(size=7, classes=5)
    config.objectives.weights.mrc = 1.0
    validate(config, 1)
    results = pipeline.run(config, workdir)
    assert results["triplets/train"] == 24 and results["set_aside/train"] == 0
    assert np.isfinite(results["retrieval/image_to_text/R@1"])
    assert not [key for key in results if "dvae" in key or "text_to_image/code" in key]
    config.encoders.ready.size = 8
    with pytest.raises(CacheError, match="regions are 7 wide, expected 8"):
        pipeline.run(config, tmp_path / "other")


def test_splits_that_cannot_be_evaluated_are_refused_before_anything_is_trained(tmp_path):
    for split in ("train", "validation", "test"):
        write_split(tmp_path / "data", split, 4, speech=split != "train", gaps=False)
    with pytest.raises(SourceError, match="validation split has audio, which the train split has not"):
        pipeline.run(config_of(tmp_path / "data", tmp_path / "run"), tmp_path / "run")
    (tmp_path / "data" / "validation.jsonl").write_text("")
    with pytest.raises(SourceError, match="validation.jsonl holds no rows"):
        pipeline.run(config_of(tmp_path / "data", tmp_path / "run"), tmp_path / "run")
    assert not (tmp_path / "run" / "encoders").exists()


def test_evaluation_is_about_the_pair_that_most_rows_have():
    def cache(*rows):
        presence = np.array(rows, bool)
        manifest = types.SimpleNamespace(split="test")
        return types.SimpleNamespace(presence=presence, manifest=manifest)

    both, seen, heard = (1, 1, 1), (1, 1, 0), (1, 0, 1)
    assert available_modalities(cache(both, both, seen)) == ("text", "image", "audio")
    assert available_modalities(cache(seen, heard, heard)) == ("text", "audio")
    assert available_modalities(cache(seen, seen)) == ("text", "image")
    with pytest.raises(CacheError, match="'test' have text, image; evaluation needs at least two"):
        available_modalities(cache(seen, (1, 0, 0)))
