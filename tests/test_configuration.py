from pathlib import Path

import numpy as np
import pytest

from opt_jax.configuration import ConfigError, check_overrides, flatten, load
from opt_jax.encoders.frozen import save_frozen
from opt_jax.validation import validate

PRETRAIN = Path(__file__).parents[1] / "configs" / "pretrain.py"
VARIANTS = ("tiny", "small", "manifest", "base_paper", "base", "large")


@pytest.fixture
def config(tmp_path):
    config = load(PRETRAIN)  # with sizes of its own, so that the tuning of `tiny` can change
    config.model.update(dict(hidden_size=192, num_layers=4, max_text_positions=32, max_audio_positions=64))
    config.loader.update(dict(text_lengths=(16, 24, 32), audio_lengths=(40, 52, 64)))
    config.cache.max_audio_positions = 64
    config.objectives.rows.update(dict(token=1, modality=2, sample=1))
    config.data.spoken_scenes.test = 500
    config.workdir = str(tmp_path)
    return config


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_share_fields_and_types_and_are_valid(variant):
    tiny, config = flatten(load(PRETRAIN)), load(PRETRAIN, variant)
    flat = flatten(config)
    assert {name: type(value) for name, value in flat.items()} == {
        name: type(value) for name, value in tiny.items()
    }
    config.data.manifest = "data/mine"  # which `manifest` asks for
    for devices in (1, 8):
        validate(config, devices)


def test_configurations_load_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load(PRETRAIN).encoders.dvae.model.vocab_size > 0


def test_unknown_variants_and_files_are_named():
    names = "tiny, small, manifest, base_paper, base, large"
    with pytest.raises(ConfigError, match=f"did you mean 'base'.*{names}"):
        load(PRETRAIN, "bases")
    with pytest.raises(ConfigError, match="no configuration file .*pretrian.py.*did you mean .*pretrain.py"):
        load(PRETRAIN.with_name("pretrian.py"))
    with pytest.raises(ConfigError, match="no get_config"):
        load(__file__)


def test_precision_is_one_field(config):
    config.precision = "bfloat16"
    assert config.model.dtype == config.train.precision == "bfloat16"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.train.batchsize=3", "'config.train.batchsize'; did you mean 'config.train.batch_size'"),
        ("--config.batch_size=3", "did you mean 'config.*batch_size'"),
        ("--config.xyzzy=3", r"unknown config field 'config.xyzzy' \(fields of config: cache, data"),
        ("--config.train=3", "'config.train' is a group of fields"),
        ("--config.train.steps=many", "^config.train.steps expects int, got 'many'$"),
        ("--config.train.steps=1.5", "config.train.steps expects int, got '1.5'"),
        ("-config.train.learning_rate=fast", "config.train.learning_rate expects float, got 'fast'"),
        ("--config.model.pre_norm=maybe", "config.model.pre_norm expects bool, got 'maybe'"),
        ("--config.loader.text_lengths=(1,x)", r"text_lengths expects a tuple such as '\(\d+, \d+"),
    ],
)
def test_wrong_overrides_are_refused_in_one_line(config, argument, message):
    with pytest.raises(ConfigError, match=message) as error:
        check_overrides(config, ["--config=configs/pretrain.py", argument])
    assert len(str(error.value).splitlines()) == 1


def test_right_overrides_pass_in_every_form(config):
    arguments = ["--workdir=x", "--config.train.steps=10", "--config.train.batch_size", "8"]
    arguments += ["--config.train.learning_rate=1", "--config.model.pre_norm", "--noconfig.model.remat"]
    check_overrides(config, [*arguments, "--config.loader.text_lengths=(8, 16)", "--config.workdir=1"])
    with pytest.raises(ConfigError, match="got 'soon'"):
        check_overrides(config, ["--config.train.batch_size", "soon"])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model.num_heads", 5, "config.model.num_heads is 5.*192; 4 would"),
        ("model.image_decoder.num_heads", 7, "config.model.image_decoder.num_heads is 7"),
        ("model.num_alignment_layers", 5, "config.model.num_alignment_layers is 5"),
        ("model.num_alignment_layers", 0, "weights.contrastive"),
        ("model.max_text_positions", 8, "raise the latter"),
        ("loader.audio_lengths", (40, 52, 60), "longer rows would be cut"),
        ("loader.text_lengths", (24, 32), "equally many"),
        ("loader.text_lengths", (24, 16, 32), "growing"),
        ("precision", "float8", "config.precision is 'float8'; choose one of 'float32'"),
        ("train.decay", "exponential", "config.train.decay"),
        ("train.warmup_steps", 2000, "warmup_steps is 2000, of config.train.steps"),
        ("train.steps", 0, "config.train.steps is 0; it must be above 0"),
        ("train.batch_size", 12, "12; it must divide by accumulation x data x fsdp = 1 x 8 x 1: 16 would"),
        ("train.accumulation", 3, "divide by accumulation"),
        ("train.mesh.data", 3, "does not fit 8 devices"),
        ("train.mesh.fsdp", -1, "config.train.mesh"),
        ("objectives.rows.modality", 4, "groups of 6"),
        ("objectives.rows.sample", 0, "matching"),
        ("objectives.mask_probability", 1.5, "config.objectives.mask_probability is 1.5"),
        ("objectives.modality_drop_probability.audio", -0.1, "modality_drop_probability.audio is -0.1"),
        ("objectives.modality_drop_probability.text", 1.0, "text is 1.0; it must lie between 0 and 1"),
        ("model.dropout", 1.0, "config.model.dropout is 1.0; it must be 0 or more and below 1"),
        ("model.frame_window", 4, "frame_window is 4; it must be odd"),
        ("train.beta1", 1.0, "config.train.beta1 is 1.0"),
        ("train.learning_rate", float("nan"), "config.train.learning_rate is nan; it must be above 0"),
        ("train.learning_rate", float("inf"), "learning_rate is inf; it must be above 0, and finite"),
        ("objectives.weights.mlm", float("inf"), "mlm is inf; it must be 0 or more, and finite"),
        ("encoders.regions", "ready", "config.encoders.regions is 'ready', which is for sources that bring"),
        ("train.early_stopping_patience", 3, "early_stopping_patience is 3, but nothing is ever validated"),
        ("seed", -1, "config.seed is -1"),
        ("cache.dtype", "float32", "config.cache.dtype is 'float32'; choose one of 'float16', 'bfloat16'"),
        (
            "encoders.detector.model.max_side",
            64,
            "detector.model.max_side is 64, so pictures would be resized",
        ),
        ("encoders.detector.train.decay", "slow", "config.encoders.detector.train.decay is 'slow'"),
        ("encoders.detector.train.batch_size", 0, "config.encoders.detector.train.batch_size is 0"),
        ("encoders.dvae.start.train.batch_size", 9000, "9000, more than config.data.spoken_scenes.train"),
        ("encoders.wav2vec2.ssl.codevector_dim", 63, "codevector_dim is 63, no multiple of num_codebooks 2"),
        ("encoders.wav2vec2.model.position_groups", 3, "position_groups is 3, which does not divide"),
        ("encoders.wav2vec2.model.conv_kernel", (10, 3), "one number for each layer"),
        (
            "encoders.wav2vec2.model.features",
            "deep",
            "features is 'deep'; choose 'context', 'conv' or '0' to '3'",
        ),
        ("encoders.wav2vec2.batches.bucket_seconds", (), "bucket_seconds is empty"),
        ("initial_parameters", "/nowhere", "initial_parameters: there is no /nowhere/model.safetensors"),
        ("encoders.dvae.pretrained", "/nowhere", "there is no /nowhere/model.safetensors"),
        ("encoders.wav2vec2.model.num_heads", 5, "wav2vec2.model.num_heads is 5, which does not divide"),
        ("encoders.detector.model.num_classes", 5, "num_classes is 5; Spoken Scenes have 48"),
        ("encoders.detector.max_objects", 4, "max_objects is 4, less than"),
        ("encoders.dvae.image_size", 60, "dvae.image_size is 60; it must be a multiple of 8"),
        ("encoders.detector.train.batch_size", 12, "12, which 8 devices do not divide; 16 would do"),
        ("encoders.tokenizer.kind", "bpe", "config.encoders.tokenizer.kind"),
        ("data.source", "youtube", "config.data.source is 'youtube'"),
        ("evaluation.beams", 0, "config.evaluation.beams is 0"),
        ("evaluation.max_new_tokens", 33, "config.evaluation.max_new_tokens is 33, more than"),
        ("objectives.placeholder_lengths.text", 20, "placeholder_lengths.text is 20.*room for 15"),
        ("objectives.placeholder_lengths.image", 9, "placeholder_lengths.image is 9.*room for 8"),
        ("objectives.placeholder_lengths.audio", 41, "placeholder_lengths.audio is 41.*room for 40"),
        ("evaluation.pool_size", 501, "config.evaluation.pool_size is 501"),
    ],
)
def test_what_does_not_fit_is_refused(config, field, value, message):
    validate(config, 8)
    part, names = config, field.split(".")
    for name in names[:-1]:
        part = part[name]
    part[names[-1]] = value
    with pytest.raises(ConfigError, match=message):
        validate(config, 8)


def test_initial_parameters_must_fit_the_model(config, tmp_path):
    given = dict(hidden_size=192, num_layers=6, pre_norm=False, vocab_size=30522)
    save_frozen(tmp_path / "bert", {"words": np.zeros(3)}, given, {})
    config.initial_parameters = str(tmp_path / "bert")
    with pytest.raises(ConfigError) as error:
        validate(config, 1)
    told = str(error.value).splitlines()
    assert len(told) == 3 and "words of its own; set config.encoders.tokenizer.kind" in told[0]
    assert told[1].startswith("config.model.num_layers is 4, config.initial_parameters has 6")
    assert told[2].startswith("config.model.pre_norm is True, config.initial_parameters has False")


def test_validation_batches_need_enough_triplets(config):
    config.train.validate_every, config.data.spoken_scenes.validation = 10, 31
    with pytest.raises(ConfigError, match="spoken_scenes.validation is 31"):
        validate(config, 8)


def test_all_problems_are_told_at_once(config):
    config.train.batch_size = 0
    config.model.num_heads = 5
    with pytest.raises(ConfigError) as error:
        validate(config, 1)
    assert len(str(error.value).splitlines()) == 2


def test_a_missing_synthesizer_names_the_extra_unless_the_data_is_there(config, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[demo\]'"):
        validate(config, 1)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "stage.json").write_text("{}")
    validate(config, 1)
