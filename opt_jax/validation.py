"""Judges a configuration before anything long starts: every problem at once, each with a way out."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import jax
from ml_collections import ConfigDict

from opt_jax.checks import DECAYS, below_one, get, not_negative, one_of, positive, probability
from opt_jax.configuration import ConfigError
from opt_jax.data.spoken_scenes.scene import MAX_OBJECTS
from opt_jax.encoders.validation import check_batches, check_encoders
from opt_jax.initial import check_initial
from opt_jax.stages import DONE

PRECISIONS = ("float32", "bfloat16", "float16")
SOURCES = ("spoken_scenes", "manifest")


def validate(config: ConfigDict, num_devices: int | None = None) -> None:
    """Checks a configuration as configs/pretrain.py makes it.

    Args:
      config: all fields.
      num_devices: of the whole run; by default those that JAX finds.

    Raises:
      ConfigError: one line for each problem.
    """
    num_devices = jax.device_count() if num_devices is None else num_devices
    checks = (_data, check_encoders, _lengths, _model, check_initial, _objectives, _training, _evaluation)
    problems = [problem for check in checks for problem in check(config)]
    problems += [*_mesh(config, num_devices), *check_batches(config, num_devices)]
    if problems:
        raise ConfigError("\n".join(problems))


def _data(config) -> Iterator[str]:
    yield from one_of(config, "data.source", SOURCES)
    yield from not_negative(config, "seed", "data.copies")
    scenes = ("train", "validation", "test", "image_size", "max_objects", "shard_size")
    yield from positive(config, *(f"data.spoken_scenes.{field}" for field in scenes))
    if config.data.source == "spoken_scenes" and config.data.spoken_scenes.max_objects > MAX_OBJECTS:
        yield (
            f"config.data.spoken_scenes.max_objects is {config.data.spoken_scenes.max_objects}; a picture has"
            f" room for {MAX_OBJECTS} at most"
        )
    if config.data.source == "manifest" and not config.data.manifest:
        yield "config.data.manifest is empty; name your data: --config.data.manifest=data/mine"
    made = (Path(config.workdir) / "data" / DONE).exists()
    if config.data.source == "spoken_scenes" and not made and not importlib.util.find_spec("espeakng_loader"):
        yield "config.data.source 'spoken_scenes' needs a speech synthesizer: pip install -e '.[demo]'"


def _lengths(config) -> Iterator[str]:
    cache, loader, model = config.cache, config.loader, config.model
    yield from one_of(config, "cache.dtype", ("float16", "bfloat16"))
    sizes = ("examples_per_shard", "processes", "audio_stack", "max_audio_positions", "max_regions")
    yield from positive(config, *(f"cache.{field}" for field in sizes))
    yield from not_negative(config, "loader.workers")
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
    yield from one_of(config, "precision", PRECISIONS)
    stacks = ("", "text_decoder.", "image_decoder.")
    for stack in stacks:
        sizes = [f"model.{stack}{field}" for field in ("num_layers", "num_heads", "mlp_size")]
        yield from positive(config, *sizes)
        heads = get(config, f"model.{stack}num_heads")
        if heads > 0 and model.hidden_size % heads:
            fits = max(n for n in range(1, heads + 1) if model.hidden_size % n == 0)
            yield (
                f"config.model.{stack}num_heads is {heads}, which does not divide config.model.hidden_size"
                f" {model.hidden_size}; {fits} would"
            )
    sizes = ("hidden_size", "alignment_size", "unroll", "max_text_positions", "max_audio_positions")
    values = ("layer_norm_epsilon", "initializer_range", "temperature_init", "temperature_min")
    yield from positive(config, *(f"model.{field}" for field in (*sizes, *values)))
    yield from below_one(config, "model.dropout")
    yield from not_negative(config, "model.frame_window")
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
    yield from not_negative(config, *(f"objectives.weights.{name}" for name in objectives.weights))
    if not any(weight > 0 for weight in objectives.weights.values()):
        yield "config.objectives.weights are all 0; there is nothing to train"
    if objectives.weights.contrastive and not config.model.num_alignment_layers:
        yield (
            "config.objectives.weights.contrastive compares what the alignment layers pool; set it to 0, or"
            " config.model.num_alignment_layers above 0"
        )
    yield from not_negative(config, *(f"objectives.rows.{name}" for name in objectives.rows))
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
    for name, value in objectives.modality_drop_probability.items():
        if not 0 < value < 1:  # else a pair of modalities may have nothing that can be dropped
            yield (
                f"config.objectives.modality_drop_probability.{name} is {value}; it must lie between 0"
                " and 1, as 0.01 for hardly ever"
            )
    shares = ("mask_probability", "word_drop_probability", "dropped_as_absent", "sample_drop_probability")
    yield from probability(config, *(f"objectives.{name}" for name in shares))
    yield from probability(config, "objectives.label_smoothing", "objectives.hard_negative_fraction")
    yield from not_negative(config, "objectives.audio_noise")
    yield from positive(config, "objectives.macl_temperature", "objectives.hard_negative_temperature")
    lengths = objectives.placeholder_lengths
    yield from positive(config, *(f"objectives.placeholder_lengths.{name}" for name in lengths))
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
    yield from one_of(config, "train.decay", DECAYS)
    sizes = ("steps", "batch_size", "accumulation", "learning_rate", "epsilon", "log_every")
    sizes += ("checkpoint_every", "checkpoint_minutes", "keep", "max_nonfinite")
    yield from positive(config, *(f"train.{field}" for field in sizes))
    counts = ("warmup_steps", "weight_decay", "clip_norm", "validate_every", "early_stopping_patience")
    yield from not_negative(config, *(f"train.{field}" for field in counts))
    yield from below_one(config, "train.beta1", "train.beta2")
    yield from probability(config, "train.end_learning_rate_fraction")
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


def _evaluation(config) -> Iterator[str]:
    may_be_zero = ("rerank_top", "seed")
    yield from not_negative(config, *(f"evaluation.{field}" for field in may_be_zero))
    fields = (field for field in config.evaluation if field not in may_be_zero)
    yield from positive(config, *(f"evaluation.{field}" for field in fields))
    longest, positions = config.evaluation.max_new_tokens, config.model.max_text_positions
    if longest > positions:
        yield (
            f"config.evaluation.max_new_tokens is {longest}, more than config.model.max_text_positions"
            f" {positions}; lower the former"
        )
    size, test = config.evaluation.pool_size, config.data.spoken_scenes.test
    if config.data.source == "spoken_scenes" and size > test:
        yield f"config.evaluation.pool_size is {size}, more than config.data.spoken_scenes.test {test}"
