"""What a configuration names beside itself - encoders, parameters, words - is looked at before all else."""

from pathlib import Path

import numpy as np
import pytest

from opt_jax import main
from opt_jax.configuration import ConfigError, load
from opt_jax.encoders.frozen import save_frozen
from opt_jax.encoders.tokenizer import SMALLEST, train_tokenizer
from opt_jax.state import with_initial
from opt_jax.validation import validate

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture
def config(tmp_path):
    config = load(CONFIGS / "pretrain.py")
    config.workdir = str(tmp_path)
    return config


def refused(config) -> str:
    """The one line that a configuration is refused with."""
    with pytest.raises(ConfigError) as error:
        validate(config, 1)
    assert "\n" not in str(error.value)
    return str(error.value)


def frozen(config, directory, name, **fields):
    """A directory of a frozen encoder, as far as a configuration looks at it."""
    made = config.encoders[name].model.to_dict() | dict(image_size=64, code_grid=[8, 8]) | fields
    save_frozen(directory, {"kernel": np.zeros(3, np.float32)}, made, {})
    return str(directory)


def test_a_frozen_encoder_of_another_kind_is_refused(config, tmp_path):
    config.encoders.wav2vec2.pretrained = frozen(config, tmp_path / "a", "dvae")
    assert "config.encoders.wav2vec2.pretrained: what was given as the wav2vec2 is none" in refused(config)
    config.encoders.wav2vec2.pretrained = frozen(config, tmp_path / "b", "wav2vec2")
    validate(config, 1)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "{", "dvae/config.json is not valid JSON"),
        ("config.json", "[1]", "dvae/config.json holds no fields"),
        ("config.json", '{"n_blk_per_group": 1}', "dvae/config.json has no .*n_hid.*image_size"),
        ("model.safetensors", "cut", "dvae/model.safetensors is damaged: SHA-256"),
        ("model.sha256", None, "there is no .*dvae/model.sha256"),
    ],
)
def test_a_damaged_frozen_encoder_is_refused(config, tmp_path, file, content, message):
    config.encoders.dvae.pretrained = frozen(config, tmp_path / "dvae", "dvae")
    validate(config, 1)
    (tmp_path / "dvae" / file).unlink()
    if content is not None:
        (tmp_path / "dvae" / file).write_text(content)
    with pytest.raises(ConfigError, match=f"^config.encoders.dvae.pretrained: .*{message}"):
        validate(config, 1)
    refused(config)


@pytest.fixture
def words(tmp_path):
    """A directory with a tokenizer, and its size."""
    return str(tmp_path / "words"), train_tokenizer(["a red ball"], 120, tmp_path / "words").vocab_size


def initial(config, directory, params, **fields):
    save_frozen(directory, params, {"hidden_size": config.model.hidden_size} | fields, {})
    return str(directory)


def test_initial_parameters_have_the_words_of_the_tokenizer(config, tmp_path, words):
    name, size = words
    config.encoders.tokenizer.update(dict(kind="pretrained", name=name))
    config.initial_parameters = initial(config, tmp_path / "a", {"a": np.zeros(1)}, vocab_size=size)
    validate(config, 1)
    config.initial_parameters = initial(config, tmp_path / "b", {"a": np.zeros(1)}, vocab_size=30522)
    assert f"{name!r}, has {size} words, config.initial_parameters has 30522" in refused(config)


@pytest.mark.parametrize(
    ("regions", "width", "classes"),
    [("ready", 2048, 1601), ("detector", 128, 49), ("pretrained", 64, 8), ("grid", 9 * 128, 2)],
)
def test_initial_parameters_have_the_regions_of_the_encoders(config, tmp_path, regions, width, classes):
    config.encoders.regions = regions.replace("pretrained", "detector")
    config.objectives.weights.mrc = 0.0
    if regions == "ready":  # Spoken Scenes bring pictures
        (tmp_path / "train.jsonl").write_text('{"id": "0"}\n')
        config.data.update(source="manifest", manifest=str(tmp_path))
    if regions == "pretrained":
        made = frozen(config, tmp_path / "detector", "detector", head_width=16, num_classes=7)
        config.encoders.detector.pretrained = made

    def params(width, classes):
        parts = {"region_projection": (width, 192)}, {"classes": (192, classes)}
        return {
            part: {name: {"kernel": np.zeros(shape, np.float32)} for name, shape in tables.items()}
            for part, tables in zip(("embedder", "heads"), parts, strict=True)
        }

    for fits in ((width, classes), (1, 2)):  # the latter are of a model without pictures
        config.initial_parameters = initial(config, tmp_path / f"fits{fits[0]}", params(*fits))
        validate(config, 1)
    config.initial_parameters = initial(config, tmp_path / "wide", params(width + 1, classes))
    assert f"the width of regions {width}, config.initial_parameters has {width + 1}" in refused(config)
    config.initial_parameters = initial(config, tmp_path / "more", params(width, classes + 1))
    told = f"with background, {classes}, config.initial_parameters has {classes + 1}"
    assert told in refused(config)


def test_initial_parameters_are_whole_and_a_models(config, tmp_path):
    config.initial_parameters = frozen(config, tmp_path / "dvae", "dvae")
    assert "is a frozen encoder; set config.encoders.dvae.pretrained to it" in refused(config)
    config.initial_parameters = initial(config, tmp_path / "a", {"a": np.zeros(1)})
    validate(config, 1)
    (tmp_path / "a" / "config.json").write_text("nothing")
    assert refused(config).startswith("config.initial_parameters: ") and "a/config.json" in refused(config)


def test_initial_parameters_that_turn_out_not_to_fit_are_told_in_one_line():
    with pytest.raises(main.expected_errors(), match="model, .*in initial_params; give the model that size"):
        with_initial({"a": np.zeros(2)}, {"a": np.zeros(3)}, "test")
    with pytest.raises(main.expected_errors(), match="no initial parameter matches.*choose others"):
        with_initial({"a": np.zeros(2)}, {"b": np.zeros(2)}, "test")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("tokenizer.vocab_size", SMALLEST - 1, f"vocab_size is {SMALLEST - 1}; .* alone are {SMALLEST}"),
        ("wav2vec2.batches.pool_batches", 0, "wav2vec2.batches.pool_batches is 0; it must be above 0"),
        ("wav2vec2.batches.evaluation_batch_size", 0, "evaluation_batch_size is 0; it must be above 0"),
        ("wav2vec2.batches.letters_per_second", 0.0, "letters_per_second is 0.0; it must be above 0"),
        ("wav2vec2.ctc.train.warmup_steps", 400, "ctc.train.warmup_steps is 400, of 400 steps"),
        ("wav2vec2.ssl.train.warmup_steps", -1, "ssl.train.warmup_steps is -1; it must be 0 or more"),
        ("detector.train.warmup_steps", 500, "detector.train.warmup_steps is 500, of 500 steps"),
        ("detector.train.log_every", 0, "detector.train.log_every is 0; it must be above 0"),
        ("dvae.start.train.warmup_steps", 2000, "dvae.start.train.warmup_steps is 2000, of 1000 steps"),
    ],
)
def test_recipes_that_cannot_work_are_refused(config, field, value, message):
    part, names = config.encoders, field.split(".")
    for name in names[:-1]:
        part = part[name]
    part[names[-1]] = value
    with pytest.raises(ConfigError, match=message):
        validate(config, 1)
    refused(config)


def test_a_tokenizer_that_cannot_be_loaded_is_refused(config, tmp_path):
    config.encoders.tokenizer.update(dict(kind="pretrained", name=str(tmp_path)))
    assert "config.encoders.tokenizer.name: " in refused(config)
    (tmp_path / "vocab.txt").write_bytes(b"\xff\xfe")
    assert "vocab.txt is no vocabulary" in refused(config)


def test_more_objects_than_a_scene_has_are_refused(config):
    config.encoders.detector.max_objects = config.data.spoken_scenes.max_objects = 6
    assert refused(config).startswith("config.data.spoken_scenes.max_objects is 6; ")
