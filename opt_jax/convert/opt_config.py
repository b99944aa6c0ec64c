"""config.json of an exported OPT: its fields, and whether those of a folder can be a model's."""

import json
import math
from collections.abc import Mapping

import numpy as np
from ml_collections import ConfigDict

MODEL_TYPE = "opt_jax"
DECODERS = ("text_decoder", "image_decoder")
# Fields of config.json, which are those of `config.model` and of `Sizes` here.
MODEL_FIELDS = (
    "hidden_size",
    "num_layers",
    "num_heads",
    "mlp_size",
    "pre_norm",
    "layer_norm_epsilon",
    "num_alignment_layers",
    "alignment_size",
    "frame_window",
    "max_text_positions",
    "max_audio_positions",
)
SIZE_FIELDS = (
    "vocab_size",
    "region_size",
    "audio_size",
    "num_region_classes",
    "num_codes",
    "codes_per_image",
)
MAY_BE_0 = ("num_alignment_layers", "frame_window", "num_region_classes", "num_classes")
LARGEST = 10**7  # that any size is


def configuration(published: Mapping) -> ConfigDict:
    """The fields of config.json that decide the parameters.

    Raises: ValueError: it is that of another model, a field is missing, or has a value that no model has.
    """
    if (found := published.get("model_type")) != MODEL_TYPE:
        raise ValueError(f"config.json: model_type is {found!r}, expected {MODEL_TYPE!r}")
    fields = (*MODEL_FIELDS, *SIZE_FIELDS, *DECODERS, "num_classes")
    missing = [name for name in fields if name not in published]
    if missing:
        raise ValueError(f"config.json has no {', '.join(missing)}")
    for name in fields:
        if name in DECODERS:
            _check_decoder(name, published[name], published["hidden_size"])
        elif name == "pre_norm":
            _demand(isinstance(published[name], bool), name, "true or false", published[name])
        elif name == "layer_norm_epsilon":
            number = isinstance(published[name], int | float) and 0 < published[name] < 1
            _demand(number, name, "a number above 0 and below 1", published[name])
        else:
            _check_whole(name, published[name], 0 if name in MAY_BE_0 else 1)
    _check_heads("num_heads", published["num_heads"], published["hidden_size"])
    aligned, layers = published["num_alignment_layers"], published["num_layers"]
    _demand(aligned <= layers, "num_alignment_layers", f"at most num_layers, {layers}", aligned)
    return ConfigDict({name: published[name] for name in fields})


def _demand(right: bool, name: str, expected: str, found) -> None:
    if not right:
        raise ValueError(f"config.json: {name} is {json.dumps(found)[:80]}, expected {expected}")


def _check_whole(name: str, found, least: int) -> None:
    whole = isinstance(found, int) and not isinstance(found, bool) and least <= found <= LARGEST
    _demand(whole, name, f"a whole number from {least} to {LARGEST}", found)


def _check_heads(name: str, heads: int, hidden_size: int) -> None:
    _demand(hidden_size % heads == 0, name, f"a divisor of hidden_size, {hidden_size}", heads)


def _check_decoder(name: str, found, hidden_size) -> None:
    sizes = ("num_layers", "num_heads", "mlp_size")
    whole = found is None or isinstance(found, Mapping) and set(sizes) <= set(found)
    _demand(whole, name, f"null or an object with {', '.join(sizes)}", found)
    for size in sizes if found else ():
        _check_whole(f"{name}.{size}", found[size], 1)
    if found:
        _check_heads(f"{name}.num_heads", found["num_heads"], hidden_size)


def check_size(shapes: Mapping[str, tuple[int, ...]], arrays: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError where a configuration asks for parameters far beyond the numbers that there are."""
    asked, there = sum(map(math.prod, shapes.values())), sum(array.size for array in arrays.values())
    if asked > 10 * there:
        raise ValueError(f"config.json describes {asked:,} numbers, and the weights have {there:,}")


def initial_configuration(config: Mapping) -> dict:
    """What a training that begins with `config.initial_parameters` is compared with: the fields of
    `config.model`, and the sizes that its data decide.

    `standardised` says that the projections take features with zero mean and unit deviation.
    """
    return {name: config[name] for name in (*MODEL_FIELDS, *SIZE_FIELDS)} | {"standardised": True}
