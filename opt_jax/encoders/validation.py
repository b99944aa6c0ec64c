"""Judges the part `encoders` of a configuration: what their training, or use, would stumble over later."""

from collections.abc import Iterator
from pathlib import Path

from opt_jax.checks import DECAYS, get, not_negative, one_of, parameters, positive
from opt_jax.data.spoken_scenes.scene import CLASS_NAMES
from opt_jax.encoders.frozen import FrozenEncoderError, check_kind, load_config
from opt_jax.encoders.tokenizer import SMALLEST, TokenizerError, load_tokenizer

ENCODERS = ("detector", "wav2vec2", "dvae")


def check_encoders(config) -> Iterator[str]:
    yield from one_of(config, "encoders.regions", ("detector", "grid", "ready"))
    yield from positive(config, "encoders.ready.size", "encoders.ready.classes", "encoders.grid.window")
    if config.encoders.grid.window % 2 == 0:
        yield f"config.encoders.grid.window is {config.encoders.grid.window}; it must be odd"
    if config.encoders.regions == "grid" and config.objectives.weights.mrc:
        yield (
            "config.objectives.weights.mrc needs the classes of a detector; set it to 0 where"
            " config.encoders.regions is 'grid'"
        )
    if config.encoders.regions == "ready" and config.data.source == "spoken_scenes":
        yield (
            "config.encoders.regions is 'ready', which is for sources that bring features of regions, and"
            " Spoken Scenes bring pictures; set it to 'detector' or 'grid'"
        )
    own = config.data.source == "manifest" and config.encoders.regions == "detector"
    if own and not config.encoders.detector.pretrained:
        yield (
            "config.encoders.regions is 'detector', which is trained on boxes, and config.data.manifest has"
            " none; set it to 'grid', or config.encoders.detector.pretrained to a detector"
        )
    yield from _tokenizer(config)
    for name in ENCODERS:
        yield from _frozen(config, name)
    yield from _recipes(config)


def _tokenizer(config) -> Iterator[str]:
    yield from one_of(config, "encoders.tokenizer.kind", ("train", "pretrained"))
    words = config.encoders.tokenizer
    if words.kind == "train" and words.vocab_size < SMALLEST:
        yield (
            f"config.encoders.tokenizer.vocab_size is {words.vocab_size}; the special tokens and single"
            f" letters alone are {SMALLEST}, raise it above that"
        )
    if words.kind == "pretrained":
        try:
            load_tokenizer(words.name)
        except TokenizerError as error:
            yield f"config.encoders.tokenizer.name: {error}"


def _frozen(config, name: str) -> Iterator[str]:
    """A frozen encoder that is named must be there, whole, of this kind, and say how it is built."""
    field = f"encoders.{name}.pretrained"
    problems = list(parameters(config, field, "name the directory of a frozen encoder, or '' to train one"))
    yield from problems
    if problems or not get(config, field):
        return
    directory = Path(get(config, field))
    given = load_config(directory)
    try:
        check_kind(name, given)
    except FrozenEncoderError as error:
        yield f"config.{field}: {error}"
        return
    needed = [*config.encoders[name].model, *(("image_size", "code_grid") if name == "dvae" else ())]
    if missing := [part for part in needed if part not in given]:
        path, names = directory / "config.json", ", ".join(missing)
        yield f"config.{field}: {path} has no {names}; make the encoder again"


def _recipes(config) -> Iterator[str]:
    """What the recipes of the encoders that are trained here would stumble over later."""
    detector, wav2vec2, dvae = (config.encoders[name] for name in ENCODERS)
    embedded = config.data.source == "spoken_scenes"
    for field in _encoder_trainings(config):
        train = get(config, field)
        sizes = ("steps", "batch_size", "learning_rate")
        yield from positive(config, *(f"{field}.{name}" for name in sizes))
        # Some recipes leave these to what `opt_jax.train` takes them for.
        optional = ("log_every", "checkpoint_every")
        yield from positive(config, *(f"{field}.{name}" for name in optional if name in train))
        yield from one_of(config, f"{field}.decay", DECAYS)
        if "warmup_steps" in train:
            yield from not_negative(config, f"{field}.warmup_steps")
            if train.warmup_steps >= train.steps:
                yield (
                    f"config.{field}.warmup_steps is {train.warmup_steps}, of {train.steps} steps: the rate"
                    " would never reach learning_rate; lower it"
                )
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
        if detector.model.max_side != config.data.spoken_scenes.image_size:
            yield (
                f"config.encoders.detector.model.max_side is {detector.model.max_side}, so pictures would be"
                " resized; set it and min_side to config.data.spoken_scenes.image_size,"
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
        counts = ("pool_batches", "evaluation_batch_size", "letters_per_second")
        yield from positive(config, *(f"encoders.wav2vec2.batches.{name}" for name in counts))
        speeds = wav2vec2.batches.speeds
        if not speeds or not all(0.5 <= speed <= 2 for speed in speeds):
            yield f"config.encoders.wav2vec2.batches.speeds is {speeds}; give numbers from 0.5 to 2"
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
        if not config.encoders[name].pretrained and (name != "detector" or config.encoders.regions == name)
    ]


def check_batches(config, num_devices: int) -> Iterator[str]:
    for field in _encoder_trainings(config):
        train = get(config, field)
        if "mesh" not in train and train.batch_size % num_devices:
            yield (
                f"config.{field}.batch_size is {train.batch_size}, which {num_devices} devices do not divide;"
                f" {-(-train.batch_size // num_devices) * num_devices} would do"
            )
