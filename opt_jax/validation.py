"""Judges a configuration before anything long starts: every problem at once, each with a way out."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import jax
from ml_collections import ConfigDict

from opt_jax.configuration import ConfigError
from opt_jax.data.spoken_scenes.scene import CLASS_NAMES
from opt_jax.stages import DONE

PRECISIONS = ("float32", "bfloat16", "float16")
DECAYS = ("linear", "cosine", "constant")
SOURCES = ("spoken_scenes",)
ENCODERS = ("detector", "wav2vec2", "dvae")


def validate(config: ConfigDict, num_devices: int | None = None) -> None:
    """Checks a configuration as configs/pretrain.py makes it.

    Args:
      config: all fields.
      num_devices: of the whole run; by default those that JAX finds.

    Raises:
      ConfigError: one line for each problem.
    """
    num_devices = jax.device_count() if num_devices is None else num_devices
    checks = (_data, _encoders, _lengths, _model, _objectives, _training, _evaluation)
    problems = [problem for check in checks for problem in check(config)]
    problems += [*_mesh(config, num_devices), *_encoder_batches(config, num_devices)]
    if problems:
        raise ConfigError("\n".join(problems))


def _one_of(config, field: str, choices) -> Iterator[str]:
    value = _get(config, field)
    if value not in choices:
        yield f"config.{field} is {value!r}; choose one of {', '.join(map(repr, choices))}"


def _positive(config, *fields: str) -> Iterator[str]:
    for field in fields:
        if not _get(config, field) > 0:  # so that NaN is refused
            yield f"config.{field} is {_get(config, field)}; it must be above 0"


def _not_negative(config, *fields: str) -> Iterator[str]:
    for field in fields:
        if not _get(config, field) >= 0:
            yield f"config.{field} is {_get(config, field)}; it must be 0 or more"


def _probability(config, *fields: str) -> Iterator[str]:
    for field in fields:
        if not 0 <= _get(config, field) <= 1:
            yield f"config.{field} is {_get(config, field)}; a probability lies between 0 and 1"


def _below_one(config, *fields: str) -> Iterator[str]:
    for field in fields:
        if not 0 <= _get(config, field) < 1:
            yield f"config.{field} is {_get(config, field)}; it must be 0 or more and below 1"


def _get(config, field: str):
    for name in field.split("."):
        config = config[name]
    return config


def _data(config) -> Iterator[str]:
    yield from _one_of(config, "data.source", SOURCES)
    yield from _not_negative(config, "seed")
    scenes = ("train", "validation", "test", "image_size", "max_objects", "shard_size")
    yield from _positive(config, *(f"data.spoken_scenes.{field}" for field in scenes))
    made = (Path(config.workdir) / "data" / DONE).exists()
    if config.data.source == "spoken_scenes" and not made and not importlib.util.find_spec("espeakng_loader"):
        yield "config.data.source 'spoken_scenes' needs a speech synthesizer: pip install -e '.[demo]'"


def _encoders(config) -> Iterator[str]:
    yield from _one_of(config, "encoders.tokenizer.kind", ("train", "pretrained"))
    yield from _positive(config, "encoders.tokenizer.vocab_size")
    for name in ENCODERS:
        directory = config.encoders[name].pretrained
        for file in ("model.safetensors", "config.json", "model.sha256"):
            if directory and not (Path(directory) / file).is_file():
                yield (
                    f"config.encoders.{name}.pretrained: there is no {Path(directory) / file};"
                    " name the directory of a frozen encoder, or '' to train one"
                )
    yield from _recipes(config)


def _recipes(config) -> Iterator[str]:
    """What the recipes of the encoders that are trained here would stumble over later."""
    detector, wav2vec2, dvae = (config.encoders[name] for name in ENCODERS)
    embedded = config.data.source == "spoken_scenes"
    for field in _encoder_trainings(config):
        train = _get(config, field)
        sizes = ("steps", "batch_size", "learning_rate")
        yield from _positive(config, *(f"{field}.{name}" for name in sizes))
        yield from _one_of(config, f"{field}.decay", DECAYS)
        if embedded and train.batch_size > config.data.spoken_scenes.train:
            yield (
                f"config.{field}.batch_size is {train.batch_size}, more than"
                f" config.data.spoken_scenes.train {config.data.spoken_scenes.train}"
            )
    if embedded and not detector.pretrained:
        if detector.model.num_classes != len(CLASS_NAMES):
            yield (
                f"config.encoders.detector.model.num_classes is {detector.model.num_classes}; Spoken Scenes"
                f" have {len(CLASS_NAMES)}"
            )
        if detector.max_objects < config.data.spoken_scenes.max_objects:
            yield (
                f"config.encoders.detector.max_objects is {detector.max_objects}, less than"
                f" config.data.spoken_scenes.max_objects {config.data.spoken_scenes.max_objects}"
            )
        if detector.image_size != config.data.spoken_scenes.image_size:
            yield (
                f"config.encoders.detector.image_size is {detector.image_size}, so it would be trained on"
                " other pictures than it is used on; set it to config.data.spoken_scenes.image_size,"
                f" {config.data.spoken_scenes.image_size}"
            )
    if not wav2vec2.pretrained:
        if not (wav2vec2.ssl.enabled or wav2vec2.ctc.enabled):
            yield "config.encoders.wav2vec2: ssl.enabled and ctc.enabled are both False; enable one"
        if wav2vec2.model.hidden_size % wav2vec2.model.num_heads:
            yield (
                f"config.encoders.wav2vec2.model.num_heads is {wav2vec2.model.num_heads}, which does not"
                f" divide hidden_size {wav2vec2.model.hidden_size}"
            )
        yield from _speech_model(config, wav2vec2)
    cell = dvae.model.patch_size * 2 ** (dvae.model.group_count - 1)
    if not dvae.pretrained and dvae.image_size % cell:
        yield f"config.encoders.dvae.image_size is {dvae.image_size}; it must be a multiple of {cell}"


def _speech_model(config, wav2vec2) -> Iterator[str]:
    model, field = wav2vec2.model, "config.encoders.wav2vec2"
    if not len(model.conv_dim) == len(model.conv_kernel) == len(model.conv_stride):
        yield f"{field}.model: conv_dim, conv_kernel and conv_stride are one number for each layer"
    if model.position_groups <= 0 or model.hidden_size % model.position_groups:
        yield (
            f"{field}.model.position_groups is {model.position_groups}, which does not divide hidden_size"
            f" {model.hidden_size}"
        )
    if wav2vec2.ssl.codevector_dim % wav2vec2.ssl.num_codebooks:
        yield (
            f"{field}.ssl.codevector_dim is {wav2vec2.ssl.codevector_dim}, no multiple of num_codebooks"
            f" {wav2vec2.ssl.num_codebooks}"
        )
    if not wav2vec2.batches.bucket_seconds:
        yield f"{field}.batches.bucket_seconds is empty; give growing lengths in seconds"
    states = [str(number) for number in range(model.num_layers + 1)]
    if model.features not in ("context", "conv", *states):
        yield (
            f"{field}.model.features is {model.features!r}; choose 'context', 'conv' or '0' to {states[-1]!r}"
        )


def _encoder_trainings(config) -> list[str]:
    """The fields of the trainings of those encoders that are trained here."""
    trains = {"detector": ["train"], "wav2vec2": [], "dvae": ["train"]}
    trains["wav2vec2"] = [
        f"{part}.train" for part in ("ssl", "ctc") if config.encoders.wav2vec2[part].enabled
    ]
    if config.encoders.dvae.start.pictures:
        trains["dvae"].append("start.train")
    return [
        f"encoders.{name}.{part}"
        for name, parts in trains.items()
        for part in parts
        if not config.encoders[name].pretrained
    ]


def _lengths(config) -> Iterator[str]:
    cache, loader, model = config.cache, config.loader, config.model
    yield from _one_of(config, "cache.dtype", ("float16", "bfloat16"))
    sizes = ("examples_per_shard", "audio_stack", "max_audio_positions", "max_regions")
    yield from _positive(config, *(f"cache.{field}" for field in sizes))
    yield from _not_negative(config, "loader.workers")
    for kind in ("text", "audio"):
        lengths, positions = loader[f"{kind}_lengths"], model[f"max_{kind}_positions"]
        if not lengths or list(lengths) != sorted(lengths) or lengths[0] <= 0:
            yield f"config.loader.{kind}_lengths is {lengths}; give growing lengths above 0, such as (16, 32)"
        elif lengths[-1] > positions:
            yield (
                f"config.loader.{kind}_lengths ends at {lengths[-1]}, config.model.max_{kind}_positions is"
                f" {positions}; raise the latter"
            )
    if loader.audio_lengths and loader.audio_lengths[-1] < cache.max_audio_positions:
        yield (
            f"config.loader.audio_lengths ends at {loader.audio_lengths[-1]}, so longer rows would be cut;"
            f" end it at config.cache.max_audio_positions, {cache.max_audio_positions}"
        )
    if len(loader.text_lengths) != len(loader.audio_lengths):
        yield "config.loader.text_lengths and audio_lengths are pairs; give them equally many lengths"


def _model(config) -> Iterator[str]:
    model = config.model
    yield from _one_of(config, "precision", PRECISIONS)
    stacks = ("", "text_decoder.", "image_decoder.")
    for stack in stacks:
        sizes = [f"model.{stack}{field}" for field in ("num_layers", "num_heads", "mlp_size")]
        yield from _positive(config, *sizes)
        heads = _get(config, f"model.{stack}num_heads")
        if heads > 0 and model.hidden_size % heads:
            fits = max(n for n in range(1, heads + 1) if model.hidden_size % n == 0)
            yield (
                f"config.model.{stack}num_heads is {heads}, which does not divide config.model.hidden_size"
                f" {model.hidden_size}; {fits} would"
            )
    sizes = ("hidden_size", "alignment_size", "unroll", "max_text_positions", "max_audio_positions")
    values = ("layer_norm_epsilon", "initializer_range", "temperature_init", "temperature_min")
    yield from _positive(config, *(f"model.{field}" for field in (*sizes, *values)))
    yield from _below_one(config, "model.dropout")
    yield from _not_negative(config, "model.frame_window")
    if model.frame_window > 0 and model.frame_window % 2 == 0:
        yield (
            f"config.model.frame_window is {model.frame_window}; it must be odd (as many frames on either"
            " side), or 0 for none"
        )
    if not 0 <= model.num_alignment_layers < model.num_layers:
        yield (
            f"config.model.num_alignment_layers is {model.num_alignment_layers}; of config.model.num_layers"
            f" {model.num_layers} it must leave one for the fusion"
        )


def _objectives(config) -> Iterator[str]:
    objectives = config.objectives
    yield from _not_negative(config, *(f"objectives.weights.{name}" for name in objectives.weights))
    if not any(weight > 0 for weight in objectives.weights.values()):
        yield "config.objectives.weights are all 0; there is nothing to train"
    if objectives.weights.contrastive and not config.model.num_alignment_layers:
        yield (
            "config.objectives.weights.contrastive compares what the alignment layers pool; set it to 0, or"
            " config.model.num_alignment_layers above 0"
        )
    yield from _not_negative(config, *(f"objectives.rows.{name}" for name in objectives.rows))
    if sum(objectives.rows.values()) <= 0:
        yield "config.objectives.rows are all 0; give each level its share of the rows, such as 1, 2, 1"
    for level, names in (
        ("token", ("mlm", "mvfr", "mrc", "mafr", "macl")),
        ("modality", ("dtr", "dir")),
        ("sample", ("matching",)),
    ):
        used = [name for name in names if objectives.weights[name] > 0]
        if used and not objectives.rows[level]:
            yield f"config.objectives.rows.{level} is 0, but {', '.join(used)} need it; or set them to 0"
    for name, probability in objectives.modality_drop_probability.items():
        if not 0 < probability < 1:  # else a pair of modalities may have nothing that can be dropped
            yield (
                f"config.objectives.modality_drop_probability.{name} is {probability}; it must lie between 0"
                " and 1, as 0.01 for hardly ever"
            )
    shares = ("mask_probability", "dropped_as_absent", "sample_drop_probability", "label_smoothing")
    yield from _probability(config, *(f"objectives.{name}" for name in shares))
    yield from _probability(config, "objectives.hard_negative_fraction")
    yield from _positive(config, "objectives.macl_temperature", "objectives.hard_negative_temperature")
    lengths = objectives.placeholder_lengths
    yield from _positive(config, *(f"objectives.placeholder_lengths.{name}" for name in lengths))
    loader = config.loader
    room = {
        "text": min(loader.text_lengths, default=1) - 1,  # [CLS] stays
        "image": config.cache.max_regions,
        "audio": min(loader.audio_lengths, default=0),
    }
    for name, positions in room.items():
        if lengths[name] > positions:
            yield (
                f"config.objectives.placeholder_lengths.{name} is {lengths[name]}, but the shortest batches"
                f" have room for {positions}; shorten it to that"
            )


def _training(config) -> Iterator[str]:
    train = config.train
    yield from _one_of(config, "train.decay", DECAYS)
    positive = ("steps", "batch_size", "accumulation", "learning_rate", "epsilon", "log_every")
    positive += ("checkpoint_every", "checkpoint_minutes", "keep", "max_nonfinite")
    yield from _positive(config, *(f"train.{field}" for field in positive))
    counts = ("warmup_steps", "weight_decay", "clip_norm", "validate_every", "early_stopping_patience")
    yield from _not_negative(config, *(f"train.{field}" for field in counts))
    yield from _below_one(config, "train.beta1", "train.beta2")
    yield from _probability(config, "train.end_learning_rate_fraction")
    if train.early_stopping_patience and not train.validate_every:
        yield (
            f"config.train.early_stopping_patience is {train.early_stopping_patience}, but nothing is ever"
            " validated; set config.train.validate_every, or the patience to 0"
        )
    if train.warmup_steps >= train.steps:
        yield (
            f"config.train.warmup_steps is {train.warmup_steps}, of config.train.steps {train.steps}: the"
            " rate would never reach config.train.learning_rate; lower it"
        )
    rows, scenes = train.batch_size, config.data.spoken_scenes.train
    if config.data.source == "spoken_scenes" and rows > scenes:
        yield f"config.train.batch_size is {rows}, more than config.data.spoken_scenes.train {scenes}"
    held_out = config.data.spoken_scenes.validation
    if config.data.source == "spoken_scenes" and train.validate_every and rows > held_out:
        yield (
            f"config.train.validate_every asks for validation in batches of {rows}, but"
            f" config.data.spoken_scenes.validation is {held_out}; raise it, or set validate_every to 0"
        )


def _mesh(config, num_devices: int) -> Iterator[str]:
    mesh, train = config.train.mesh, config.train
    sizes = dict(mesh)
    free = [name for name, size in sizes.items() if size == -1]
    if any(size < 1 and size != -1 for size in sizes.values()) or len(free) > 1:
        yield f"config.train.mesh is {sizes}; sizes are above 0, one of them may be -1, for the rest"
        return
    known = 1
    for size in sizes.values():
        known *= 1 if size == -1 else size
    if num_devices % known or (not free and known != num_devices):
        yield (
            f"config.train.mesh {sizes} does not fit {num_devices} devices; its product must be that number"
            " (-1: whatever remains)"
        )
        return
    for name in free:
        sizes[name] = num_devices // known
    group = sum(config.objectives.rows.values())
    if sizes["data"] * sizes["fsdp"] % jax.process_count():
        yield (
            f"config.train.mesh {sizes}: data x fsdp must be a multiple of the {jax.process_count()}"
            " processes, each of which loads rows of its own; make tensor smaller, or run fewer processes"
        )
    parts = train.accumulation * sizes["data"] * sizes["fsdp"]
    if parts > 0 and train.batch_size % parts:
        near = max(1, round(train.batch_size / parts)) * parts
        yield (
            f"config.train.batch_size is {train.batch_size}; it must divide by accumulation x data x fsdp ="
            f" {train.accumulation} x {sizes['data']} x {sizes['fsdp']}: {near} would"
        )
    elif group > 0 and train.accumulation > 0 and train.batch_size % (train.accumulation * group):
        yield (
            f"config.train.batch_size is {train.batch_size}; a microbatch of it"
            f" ({train.batch_size // train.accumulation} rows) must divide into groups of {group}, the sum of"
            " config.objectives.rows"
        )


def _encoder_batches(config, num_devices: int) -> Iterator[str]:
    for field in _encoder_trainings(config):
        train = _get(config, field)
        if "mesh" not in train and train.batch_size % num_devices:
            yield (
                f"config.{field}.batch_size is {train.batch_size}, which {num_devices} devices do not divide;"
                f" {-(-train.batch_size // num_devices) * num_devices} would do"
            )


def _evaluation(config) -> Iterator[str]:
    may_be_zero = ("rerank_top", "seed")
    yield from _not_negative(config, *(f"evaluation.{field}" for field in may_be_zero))
    fields = (field for field in config.evaluation if field not in may_be_zero)
    yield from _positive(config, *(f"evaluation.{field}" for field in fields))
    longest, positions = config.evaluation.max_new_tokens, config.model.max_text_positions
    if longest > positions:
        yield (
            f"config.evaluation.max_new_tokens is {longest}, more than config.model.max_text_positions"
            f" {positions}; lower the former"
        )
    size, test = config.evaluation.pool_size, config.data.spoken_scenes.test
    if config.data.source == "spoken_scenes" and size > test:
        yield f"config.evaluation.pool_size is {size}, more than config.data.spoken_scenes.test {test}"
