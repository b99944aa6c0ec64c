"""Judges `config.initial_parameters`: whether they fit the model, its words and the encoders' features."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from opt_jax.checks import parameters
from opt_jax.encoders.frozen import TELLING, FrozenEncoderError, load_config, load_frozen
from opt_jax.encoders.resnet import EXPANSION
from opt_jax.encoders.tokenizer import TokenizerError, load_tokenizer

FIELD = "config.initial_parameters"


def check_initial(config) -> Iterator[str]:
    remedy = "name what the converter made, or '' to start fresh"
    missing = list(parameters(config, "initial_parameters", remedy))
    yield from missing
    if missing or not config.initial_parameters:
        return
    try:
        params, given = load_frozen(config.initial_parameters)
    except FrozenEncoderError as error:
        yield f"{FIELD}: {error}"
        return
    for name, field in TELLING.items():
        if field in given:
            yield f"{FIELD} is a frozen encoder; set config.encoders.{name}.pretrained to it, and this to ''"
            return
    yield from _words(config, given.pop("vocab_size", 0))
    for name, value in given.items():
        if name in config.model and config.model[name] != value:
            yield f"config.model.{name} is {config.model[name]}, {FIELD} has {value}; set it to that"
    yield from _features(config, params)


def _words(config, vocab_size: int) -> Iterator[str]:
    tokenizer = config.encoders.tokenizer
    if not vocab_size:
        return
    if tokenizer.kind != "pretrained":
        yield (
            f"{FIELD} has words of its own; set config.encoders.tokenizer.kind to 'pretrained', and"
            " encoders.tokenizer.name to their tokenizer"
        )
        return
    try:
        found = load_tokenizer(tokenizer.name).vocab_size
    except TokenizerError:
        return  # told of the tokenizer itself
    if found != vocab_size:
        yield (
            f"config.encoders.tokenizer.name, {tokenizer.name!r}, has {found} words, {FIELD} has"
            f" {vocab_size}; name the tokenizer that these were trained with"
        )


def _features(config, params: Mapping) -> Iterator[str]:
    try:
        width, classes = _regions(config)
    except (FrozenEncoderError, KeyError):
        return  # told of the encoder itself
    # 1 and 2 are those of a model that was trained without pictures.
    for what, (field, wanted), (part, name, axis), without in (
        ("the width of regions", width, ("embedder", "region_projection", 0), 1),
        ("the number of region classes, with background,", classes, ("heads", "classes", 1), 2),
    ):
        kernel = params.get(part, {}).get(name, {}).get("kernel")
        found = wanted if kernel is None else np.shape(kernel)[axis]
        if found not in (wanted, without):
            yield (
                f"config.encoders.{field} makes {what} {wanted}, {FIELD} has {found}; choose the encoder that"
                " these were trained with"
            )


def _regions(config) -> tuple[tuple[str, int], tuple[str, int]]:
    """Width, and number of classes with background, of regions; each after the field that decides it."""
    encoders = config.encoders
    if encoders.regions == "ready":
        return ("ready.size", encoders.ready.size), ("ready.classes", encoders.ready.classes + 1)
    name = "detector" if encoders.regions == "detector" else "dvae"
    own = encoders[name]
    made = load_config(Path(own.pretrained)) if own.pretrained else own.model
    if name == "detector":
        return (name, EXPANSION * made["head_width"]), (name, made["num_classes"] + 1)
    width = encoders.grid.window**2 * made["n_hid"] * 2 ** (made["group_count"] - 1)
    return ("grid", width), ("regions", 2)
