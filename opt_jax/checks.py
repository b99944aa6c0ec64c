"""Checks of single fields of a configuration: each yields what is wrong and what to do, a line a problem."""

import math
from collections.abc import Iterator
from pathlib import Path

from opt_jax.encoders.frozen import FrozenEncoderError, digest

DECAYS = ("linear", "cosine", "constant")


def one_of(config, field: str, choices) -> Iterator[str]:
    value = get(config, field)
    if value not in choices:
        yield f"config.{field} is {value!r}; choose one of {', '.join(map(repr, choices))}"


def positive(config, *fields: str) -> Iterator[str]:
    for field in fields:
        if not 0 < get(config, field) < math.inf:  # so that NaN is refused
            yield f"config.{field} is {get(config, field)}; it must be above 0, and finite"


def not_negative(config, *fields: str) -> Iterator[str]:
    for field in fields:
        if not 0 <= get(config, field) < math.inf:
            yield f"config.{field} is {get(config, field)}; it must be 0 or more, and finite"


def probability(config, *fields: str) -> Iterator[str]:
    for field in fields:
        if not 0 <= get(config, field) <= 1:
            yield f"config.{field} is {get(config, field)}; a probability lies between 0 and 1"


def below_one(config, *fields: str) -> Iterator[str]:
    for field in fields:
        if not 0 <= get(config, field) < 1:
            yield f"config.{field} is {get(config, field)}; it must be 0 or more and below 1"


def get(config, field: str):
    """The value of 'part.name', as a flag names it."""
    for name in field.split("."):
        config = config[name]
    return config


def parameters(config, field: str, remedy: str) -> Iterator[str]:
    """A directory of parameters, if one is named, must be there and whole."""
    directory = get(config, field)
    if not directory:
        return
    for file in ("model.safetensors", "config.json", "model.sha256"):
        if not (Path(directory) / file).is_file():
            yield f"config.{field}: there is no {Path(directory) / file}; {remedy}"
            return
    try:
        digest(directory)
    except FrozenEncoderError as error:
        yield f"config.{field}: {error}"
