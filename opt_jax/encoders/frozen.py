"""Storage of a frozen encoder: one directory with its parameters, its configuration and its scores.

model.safetensors   every parameter under its path, joined by '/'
config.json         what rebuilds the module
metrics.json        what the encoder reached when it was made
model.sha256        SHA-256 of model.safetensors (`sha256sum -c` reads it); written last, so a directory
                    without it was never finished
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load as parse_safetensors
from safetensors.numpy import save as safetensors_bytes

_MODEL, _CONFIG, _METRICS, _HASH = "model.safetensors", "config.json", "metrics.json", "model.sha256"
# What only the configuration of this encoder has.
TELLING = {"detector": "anchor_sizes", "wav2vec2": "conv_kernel", "dvae": "n_blk_per_group"}


class FrozenEncoderError(ValueError):
    """A frozen encoder's directory is unfinished or damaged, or its content cannot be stored."""


def save_frozen(directory, params, config, metrics) -> None:
    """Writes a frozen encoder; every file appears whole or not at all. Of several processes the first writes.

    Args:
        directory: where to write; made if absent, files of an earlier encoder there are replaced.
        params: nested mapping with string keys; leaves are arrays (numpy or jax) of any shape, of a
            floating (16 to 64 bits, no bfloat16), integer or boolean dtype.
        config: mapping (or ConfigDict) that JSON can hold; tuples come back as lists.
        metrics: mapping of scores that JSON can hold.

    Raises:
        FrozenEncoderError: a key is no string or holds '/', or a dtype has no safetensors name.
    """
    if jax.process_index():
        return
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    flat = _flatten(params)
    if not flat:
        raise FrozenEncoderError(f"{directory}: there are no parameters to save")
    content = safetensors_bytes(flat)
    (directory / _HASH).unlink(missing_ok=True)
    _write(directory / _CONFIG, _json_bytes(config))
    _write(directory / _METRICS, _json_bytes(metrics))
    _write(directory / _MODEL, content)
    _write(directory / _HASH, f"{hashlib.sha256(content).hexdigest()}  {_MODEL}\n".encode())


def load_frozen(directory) -> tuple[dict, dict]:
    """Reads what `save_frozen` wrote: (nested dict of numpy arrays, config dict).

    Raises:
        FrozenEncoderError: the directory is unfinished, or a file's content is not what was written; the
            message names the file.
    """
    directory = Path(directory)
    content = _verified_model(directory)
    try:
        flat = parse_safetensors(content)
    except (SafetensorError, KeyError) as error:
        raise FrozenEncoderError(f"{directory / _MODEL} is no safetensors file: {error}") from error
    return unflatten_dict(flat, sep="/"), load_config(directory)


def digest(directory) -> str:
    """SHA-256 (hex) over the parameters' bytes and the configuration: equal exactly for equal encoders.

    Raises:
        FrozenEncoderError: as `load_frozen`.
    """
    directory = Path(directory)
    state = hashlib.sha256(_verified_model(directory))
    state.update(_json_bytes(load_config(directory)))
    return state.hexdigest()


def check_kind(name: str, config: Mapping) -> None:
    """Raises FrozenEncoderError where a configuration is not that of the encoder `name` (see `TELLING`)."""
    if TELLING[name] not in config:
        raise FrozenEncoderError(
            f"what was given as the {name} is none: its config.json has no {TELLING[name]!r}, it has"
            f" {', '.join(sorted(config)[:4])}..."
        )


def _flatten(tree: Mapping, prefix: str = "") -> dict[str, np.ndarray]:
    flat = {}
    for key in sorted(tree, key=str):
        if not isinstance(key, str) or "/" in key or not key:
            raise FrozenEncoderError(f"parameter key {key!r} under {prefix!r}: keys are strings without '/'")
        value = tree[key]
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}/"))
            continue
        value = np.asarray(value, order="C")
        if value.dtype.kind not in "fiub" or value.dtype.itemsize > 8:
            raise FrozenEncoderError(
                f"parameter {prefix}{key} has dtype {value.dtype}; convert it to float32 first"
            )
        flat[prefix + key] = value
    return flat


def _verified_model(directory: Path) -> bytes:
    if not (directory / _HASH).is_file():
        raise FrozenEncoderError(
            f"{directory} holds no finished frozen encoder ({_HASH} is missing); run the recipe that makes it"
        )
    content = _read(directory / _MODEL)
    expected = _read(directory / _HASH).decode(errors="replace").split(" ")[0]
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise FrozenEncoderError(
            f"{directory / _MODEL} is damaged: SHA-256 {found}, expected {expected}; make the encoder again"
        )
    return content


def load_config(directory: Path) -> dict:
    """The configuration in a frozen encoder's directory. Raises FrozenEncoderError."""
    try:
        config = json.loads(_read(directory / _CONFIG))
    except ValueError as error:
        if isinstance(error, FrozenEncoderError):
            raise
        raise FrozenEncoderError(
            f"{directory / _CONFIG} is not valid JSON ({error}); make the encoder again"
        ) from error
    if not isinstance(config, dict):
        raise FrozenEncoderError(f"{directory / _CONFIG} holds no fields; make the encoder again")
    return config


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise FrozenEncoderError(f"{path} is missing; make the encoder again") from error


def _json_bytes(value) -> bytes:
    value = value.to_dict() if hasattr(value, "to_dict") else value
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def _write(path: Path, content: bytes) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with open(aside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
