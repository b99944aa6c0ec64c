"""The whole run at the smallest sizes: every stage, every key of results.json, the report, a second run."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from opt_jax import pipeline
from opt_jax.cache import CacheError, FeatureCache
from opt_jax.configuration import load
from opt_jax.evaluation.pretrained import DIRECTIONS, INPUT_SETS
from opt_jax.predict import main as predict
from opt_jax.stages import StageMismatch
from opt_jax.trained import load_trained
from opt_jax.validation import validate

ROOT = Path(__file__).parents[1]


def smallest_config(workdir, variant="tiny"):
    """A variant with sizes at which a stage takes seconds: it learns nothing."""
    config = load(ROOT / "configs" / "pretrain.py", variant)
    config.workdir = str(workdir)
    config.data.spoken_scenes.update(train=32, validation=10, test=20, shard_size=16)
    config.encoders.detector.train.update(steps=2, batch_size=4)
    config.encoders.dvae.start.update(pictures=16)
    config.encoders.dvae.start.train.update(steps=1, batch_size=4)
    config.encoders.dvae.train.update(steps=2, batch_size=4)
    config.encoders.wav2vec2.ssl.train.update(steps=1, batch_size=4)
    config.encoders.wav2vec2.ctc.train.update(steps=1, batch_size=4)
    encoders = config.encoders
    trains = (encoders.detector.train, encoders.dvae.start.train, encoders.dvae.train)
    trains += (encoders.wav2vec2.ssl.train, encoders.wav2vec2.ctc.train)
    with config.unlocked():  # fake devices gain nothing here, and cost compiling
        for train in (*trains, config.train):
            train.mesh = dict(data=1, fsdp=1, tensor=1)
    for train in trains:
        train.warmup_steps = 0
    config.cache.update(examples_per_shard=16, max_audio_positions=64)
    config.objectives.placeholder_lengths.update(text=12, image=6, audio=32)
    config.loader.update(text_lengths=(20,), audio_lengths=(64,))
    decoder = dict(num_layers=1, num_heads=2, mlp_size=32)
    config.model.update(hidden_size=32, num_layers=2, num_heads=2, mlp_size=32, max_audio_positions=64)
    config.model.num_alignment_layers = min(config.model.num_alignment_layers, 1)
    config.model.update(text_decoder=decoder, image_decoder=decoder)
    config.train.update(steps=6, batch_size=8, log_every=1, warmup_steps=1)
    config.evaluation.update(batch_size=10, pool_size=10, pools=2, texts=10, probe_train=20, pictures=4)
    config.evaluation.update(examples=6, rerank_top=3, max_new_tokens=4, beams=2)
    return config


@pytest.fixture(scope="module")
def finished(pretrained):
    results = json.loads((pretrained / "results.json").read_text())
    return smallest_config(pretrained), pretrained, results


def test_results_have_every_key_and_are_finite(finished):
    results = finished[2]
    scorers = ["retrieval"] + [
        f"retrieval_{n}" for n in ("alignment", "matching", "likelihood", "information")
    ]
    wanted = [f"{scorer}/{way}/R@{k}" for scorer in scorers for way in DIRECTIONS for k in (1, 5, 10)]
    wanted += [f"speech_recognition/{source}/WER" for source in ("audio", "audio_image")]
    wanted += [
        f"captioning/{source}/{metric}"
        for source in ("image", "audio", "image_audio")
        for metric in ("BLEU-4", "CIDEr")
    ]
    wanted += [f"classification/{name}/mAP" for name in INPUT_SETS]
    wanted += ["retrieval_information_alone/image_to_text/R@1", "set_aside/train"]
    wanted += ["text_to_image/code_accuracy", "text_to_image/named_objects_found", "seconds/pretrain"]
    for key in wanted:
        assert np.isfinite(results[key]), key


def test_every_objective_was_logged(finished):
    config, workdir, _ = finished
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for name in config.objectives.weights:  # null where a step had nothing to ask of this objective
        values = [line[name] for line in lines if line[name] is not None]
        assert values and np.isfinite(values).all(), name


def test_report_is_one_file_with_pictures_and_speech(finished):
    page = (finished[1] / "report.html").read_text()
    assert "left out to keep the page small" not in page
    assert page.count("data:image/png;base64") >= 4 and "data:audio/mpeg;base64" in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "<script" not in page


def test_a_second_run_makes_nothing_again(finished, capsys):
    config, workdir, results = finished
    again = pipeline.run(config, workdir)
    told = capsys.readouterr().out
    encoders = [f"encoders/{name}" for name in pipeline.ENCODERS]
    for stage in ("data", *encoders, "cache/train", "evaluation"):
        assert f"{stage}: up to date" in told
    assert again == results


def test_other_data_in_the_same_workdir_is_refused(finished):
    config, workdir, _ = finished
    other = config.copy_and_resolve_references()
    other.data.spoken_scenes.train = 48
    with pytest.raises(StageMismatch, match="32 -> 48"):
        pipeline.run(other, workdir)


@pytest.mark.parametrize("damage", ["a cut shard", "no shard", "no cache"])
def test_a_damaged_cache_is_mended(finished, capsys, damage):
    config, workdir, results = finished
    features = workdir / "cache" / "test" / "features"
    shard = next(features.glob("*.array_record*"))
    content = shard.read_bytes()
    if damage == "a cut shard":
        shard.write_bytes(content[:-10])
    elif damage == "no shard":
        shard.unlink()
    else:
        shutil.rmtree(features)
    again = pipeline.run(config, workdir)
    told = capsys.readouterr().out
    assert "cache/test: is damaged, and mended" in told and "cache/train: up to date" in told
    assert (shard.name in told) == (damage != "no cache") and shard.read_bytes() == content
    assert without_seconds(again) == without_seconds(results)


def test_a_damaged_record_is_named(finished):
    _, workdir, _ = finished
    features = workdir / "cache" / "test" / "features"
    shard = next(features.glob("*.array_record*"))
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2] + b"\xff" * 64 + content[len(content) // 2 + 64 :])
    try:
        with pytest.raises(CacheError, match=shard.name):
            cache = FeatureCache(features)
            [cache[row] for row in range(len(cache))]
    finally:
        shard.write_bytes(content)


def without_seconds(results):
    return {key: value for key, value in results.items() if not key.startswith("seconds/")}


def test_a_trained_model_is_loaded_with_the_parameters_of_its_last_step(finished):
    config, workdir, _ = finished
    trained = load_trained(workdir)
    assert trained.step == config.train.steps and trained.modalities == ("text", "image", "audio")
    sources = pipeline.make_sources(config, workdir)
    cache = FeatureCache(workdir / "cache" / "test" / "features")
    loader = pipeline.make_loader(config, cache, trained.regions, whole=True)
    (cached,) = loader.evaluation_batches(range(4), 4, loader.config.buckets[-1])
    batch = trained.batch([sources["test"][int(cache.source_row[row])] for row in range(4)])
    for name, value in cached.items():  # in one call of the encoders more or fewer rows
        if value.dtype.kind == "f":
            np.testing.assert_allclose(batch[name], value, rtol=2e-3, atol=2e-3, err_msg=name)
        elif name != "index":
            np.testing.assert_array_equal(batch[name], value, err_msg=name)


def test_a_trained_model_is_asked(finished, tmp_path, capsys):
    _, workdir, _ = finished
    source = pipeline.spoken_scenes.SpokenScenes(workdir / "data", "test")
    Image.fromarray(source[0].image).save(tmp_path / "a.png")
    soundfile.write(tmp_path / "a.wav", source[0].audio, 16_000)
    seen = [f"--workdir={workdir}", f"--image={tmp_path / 'a.png'}"]
    texts = ["--text=a red ball", "--text=a tree"]
    assert predict([*seen, f"--audio={tmp_path / 'a.wav'}", *texts, "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)
    assert set(answers) == {"caption", "transcript", "texts"}
    assert {(said["text"], said["with"]) for said in answers["texts"]} == {
        (text, other) for text in ("a red ball", "a tree") for other in ("image", "audio")
    }
    assert all(0 < said["match"] < 1 and -1 <= said["similarity"] <= 1 for said in answers["texts"])
    for drawn in ([f"--audio={tmp_path / 'a.wav'}"], ["--text=a red ball"]):
        assert predict([f"--workdir={workdir}", *drawn, f"--out={tmp_path / 'drawn.png'}"]) == 0
        assert "drawn.png" in capsys.readouterr().out
        assert Image.open(tmp_path / "drawn.png").size == (256, 256)
        (tmp_path / "drawn.png").unlink()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workdir={tmp}", "--text=a"], "holds no config.json"),
        (["--workdir={run}", "--text=a", "--step=5000"], "holds no checkpoint of step 5000; it has"),
        (["--workdir={run}", "--image={tmp}/none.png"], "'none.png' cannot be read"),
        (["--workdir={run}", "--image={tmp}/text.png"], "image is no picture"),
        (["--workdir={run}", "--text= "], "caption is empty"),
        (["--workdir={run}"], "give --image, --audio or --text"),
        (["--workdir={run}", "--text=a", "--text=b"], "several texts are compared with a picture"),
        (["--workdir={run}", "--text=a", "--out={tmp}/a.txt"], "expected a .png, .jpg or .webp"),
    ],
)
def test_questions_that_cannot_be_asked(finished, tmp_path, capsys, flags, message):
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(SystemExit, match="2"):
        predict([flag.format(tmp=tmp_path, run=finished[1]) for flag in flags])
    assert message in capsys.readouterr().err and not list(tmp_path.glob("*.txt"))


@pytest.mark.slow  # as `finished`, once more, for each of the other variants
@pytest.mark.parametrize("variant", ["small", "base_paper", "base", "large"])
def test_every_other_variant_runs(tmp_path, variant):
    config = smallest_config(tmp_path, variant)
    group = sum(config.objectives.rows.values())
    config.train.batch_size = 2 * group
    if config.train.early_stopping_patience:
        config.train.update(validate_every=2, early_stopping_patience=2)
    validate(config, 1)
    results = pipeline.run(config, tmp_path)
    aligned = config.model.num_alignment_layers > 0
    assert ("retrieval_alignment/image_to_text/R@1" in results) == aligned == (variant != "base_paper")
    assert np.isfinite(results["retrieval/image_to_text/R@1"])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert any("validation/total" in line for line in lines) == (variant == "base_paper")
    assert any("contrastive" in line for line in lines) == aligned
