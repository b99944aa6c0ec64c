"""Weights as safetensors files that are written a tensor at a time, several of them above a size.

The format (https://github.com/huggingface/safetensors#format): the length of a header in 8 bytes, the header
in JSON with each tensor's dtype, shape and place, and the numbers. The library's own writer wants all tensors
at once.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

INDEX = "model.safetensors.index.json"
DTYPES = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class ExportError(ValueError):
    """A folder cannot be written; the message says what to do."""


@dataclass(frozen=True)
class Planned:
    """A tensor to write. dtype: one of `DTYPES`."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(DTYPES[self.dtype]).itemsize


def total_size(tensors: Iterable[Planned]) -> int:
    return sum(tensor.size for tensor in tensors)


def split(tensors: Sequence[Planned], limit: int) -> dict[str, list[Planned]]:
    """Files by name, each of at most `limit` bytes where no single tensor has more; one file where it may."""
    parts: list[list[Planned]] = [[]]
    for tensor in tensors:
        if parts[-1] and total_size(parts[-1]) + tensor.size > limit:
            parts.append([])
        parts[-1].append(tensor)
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{i:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts, 1)}


def write_weights(
    directory: Path, tensors: Sequence[Planned], values: Iterable[np.ndarray], limit: int
) -> None:
    """Writes the `values`, each when it is drawn, and above `limit` bytes an index of the files.

    values: as long as `tensors`, of their shapes, in any floating dtype that theirs can hold.

    Raises: ExportError: a number is beyond those of the dtype to be written.
    """
    files, values = split(tensors, limit), iter(values)
    for name, part in files.items():
        _write_file(directory / name, part, values)
    if len(files) > 1:
        places = {tensor.name: name for name, part in files.items() for tensor in part}
        index = {"metadata": {"total_size": total_size(tensors)}, "weight_map": places}
        (directory / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def _write_file(path: Path, tensors: Sequence[Planned], values) -> None:
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for tensor in tensors:
        place = {"data_offsets": [end, end := end + tensor.size]}
        header[tensor.name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape)} | place
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers begin at a multiple of 8
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors:
            file.write(_converted(tensor, next(values)).tobytes())
        file.flush()
        os.fsync(file.fileno())


def _converted(tensor: Planned, value: np.ndarray) -> np.ndarray:
    if value.shape != tensor.shape:
        raise ValueError(f"{tensor.name} is {list(value.shape)}, expected {list(tensor.shape)}")
    if value.dtype == DTYPES[tensor.dtype]:
        return value
    with np.errstate(over="ignore"):
        converted = value.astype(DTYPES[tensor.dtype])
    if (np.isfinite(value) & ~np.isfinite(converted)).any():
        raise ExportError(f"{tensor.name} has numbers beyond {tensor.dtype}; export with --dtype=float32")
    return converted
