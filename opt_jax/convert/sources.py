"""Published files as numpy arrays by name. The only place that reads pickles; none of them may run code.

safetensors are read as they are; torch's own files with `weights_only=True`; pickles of numpy arrays
(detectors trained on Visual Genome) and of whole torch modules (the published discrete VAE) with unpicklers
that admit arrays, tensors and plain containers. Whatever else a pickle names is refused or becomes an empty
shell.
"""

import collections
import json
import pickle
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
NUMPY_MODULES = {
    "numpy",
    *(f"numpy.{core}.{part}" for core in ("core", "_core") for part in ("multiarray", "numeric")),
}
NUMPY = {"_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer"}
TENSORS = {"_rebuild_tensor_v2", "_rebuild_tensor", "_rebuild_parameter"}


class SourceFileError(ValueError):
    """A published file is missing, damaged, foreign, or holds what may not be loaded."""


def read_arrays(source: Path) -> dict[str, np.ndarray]:
    """The arrays of a file, or of a directory with one of `NAMES`; halves become float32.

    Raises: SourceFileError, which names the file.
    """
    source = Path(source)
    if source.is_dir():
        found = [source / name for name in NAMES if (source / name).is_file()]
        if not found:
            raise SourceFileError(f"{source}: there is none of {', '.join(NAMES)}")
        source = found[0]
    if not source.is_file():
        raise SourceFileError(f"{source}: there is no such file")
    readers = {
        ".safetensors": _safetensors,
        ".json": _sharded,
        ".bin": _torch,
        ".pt": _torch,
        ".pth": _torch,
        ".pkl": _pickle,
    }
    if source.suffix not in readers:
        raise SourceFileError(f"{source}: expected one of {', '.join(readers)}")
    try:
        arrays = readers[source.suffix](source)
    except SourceFileError:
        raise
    except Exception as error:  # a foreign file may be anything inside
        raise SourceFileError(f"{source} cannot be read: {_first_line(error)}") from error
    if not arrays:
        raise SourceFileError(f"{source}: there are no arrays in it")
    for name, array in arrays.items():
        if array.dtype.kind not in "fiub" and array.dtype.name != "bfloat16":
            raise SourceFileError(f"{source}: {name} holds {array.dtype}, not numbers")
    return {name: _at_least_float32(array) for name, array in arrays.items()}


def _at_least_float32(array: np.ndarray) -> np.ndarray:
    small = array.dtype.kind == "f" and array.dtype.itemsize < 4 or array.dtype.name == "bfloat16"
    return array.astype(np.float32) if small else array


def _safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        # numpy has no bfloat16 and ml_dtypes brings one, which the library knows by its name.
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise SourceFileError(f"{path} is no safetensors file, or damaged: {error}") from error


def _sharded(path: Path) -> dict[str, np.ndarray]:
    try:
        shards = sorted(set(json.loads(path.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise SourceFileError(f"{path} is no index of safetensors shards: {error!r}") from error
    arrays = {}
    for shard in shards:
        if Path(shard).name != shard:
            raise SourceFileError(f"{path} names the shard {shard!r}, which is not beside it")
        arrays |= _safetensors(path.parent / shard)
    return arrays


def _torch(path: Path) -> dict[str, np.ndarray]:
    torch = _import_torch(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds, all for a file that it does not load
        raise SourceFileError(
            f"{path} is no file of tensors alone, or damaged: {_first_line(error)}"
        ) from error
    return _flat_arrays(content, path)


def _import_torch(path: Path):
    try:
        import torch
    except ImportError as error:
        raise SourceFileError(f"{path}: torch's own files need torch: pip install -e '.[torch]'") from error
    return torch


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


def _flat_arrays(content, path: Path) -> dict[str, np.ndarray]:
    """Tensors and arrays by name, out of a mapping or one in it, such as {'model': {...}}."""
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise SourceFileError(f"{path} holds a {type(content).__name__}, not arrays by name")
    arrays = {}
    for name, value in content.items():
        if isinstance(value, np.ndarray):
            arrays[str(name)] = value
        elif hasattr(value, "detach"):
            arrays[str(name)] = _numpy(value)
    return arrays


def _numpy(tensor) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).cpu().numpy()


def _pickle(path: Path) -> dict[str, np.ndarray]:
    with open(path, "rb") as file:
        is_zip = file.read(2) == b"PK"  # torch.save of a whole module
    if is_zip:
        return _module(path)
    try:
        with open(path, "rb") as file:
            content = _ArraysOnly(file, encoding="latin1").load()
    except _NotAnArrayError as error:
        raise SourceFileError(f"{path} names {error}; only arrays are loaded from a pickle") from error
    except Exception as error:  # a damaged pickle may raise anything
        raise SourceFileError(f"{path} is no pickle of arrays, or damaged: {_first_line(error)}") from error
    return _flat_arrays(content, path)


class _NotAnArrayError(pickle.UnpicklingError):
    """A pickle names something else; the message says what."""


class _Call:
    """A function for a pickle to call, not to change: a pickle may set attributes on what it was given."""

    __slots__ = ("_function",)

    def __init__(self, function):
        object.__setattr__(self, "_function", function)

    def __call__(self, *arguments):
        return self._function(*arguments)

    def __setattr__(self, name, _):
        raise pickle.UnpicklingError(f"it would set {name} on a function")

    def __setstate__(self, _):
        raise pickle.UnpicklingError("it would change a function")


def _admitted(found):
    """Classes of C cannot be changed; functions go in a shell that cannot."""
    return found if isinstance(found, type) else _Call(found)


class _ArraysOnly(pickle.Unpickler):
    """Admits numpy arrays, ordered dictionaries and text, nothing else."""

    def find_class(self, module, name):
        if module in NUMPY_MODULES and name in NUMPY:
            return _admitted(super().find_class(module, name))
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("_codecs", "encode"):  # how Python 2 wrote bytes
            return _Call(_latin1)
        raise _NotAnArrayError(f"{module}.{name}")


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    return text.encode("latin1")


class _Shell:
    """Stands for any class of a pickled module: keeps the state, runs nothing."""

    def __init__(self, *_, **__):
        pass

    def __setstate__(self, state):
        state = state[0] if isinstance(state, tuple) else state
        if isinstance(state, Mapping):
            self.__dict__.update(state)


class _ModuleShells(pickle.Unpickler):
    """Rebuilds tensors; modules, and whatever else a module holds, become shells."""

    def find_class(self, module, name):
        if module == "torch._utils" and name in TENSORS:
            return _Call(super().find_class(module, name))
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        return _Shell


class _Pickle:
    """What `torch.load` takes for the module `pickle`."""

    Unpickler = _ModuleShells
    load = staticmethod(lambda file, **options: _ModuleShells(file, **options).load())


def _module(path: Path) -> dict[str, np.ndarray]:
    """The parameters and buffers of a module that was saved whole, under the names of its state_dict."""
    torch = _import_torch(path)
    try:
        shell = torch.load(path, map_location="cpu", pickle_module=_Pickle, weights_only=False)
    except Exception as error:
        raise SourceFileError(f"{path} is no saved module, or damaged: {_first_line(error)}") from error
    if isinstance(shell, Mapping):
        return _flat_arrays(shell, path)
    arrays: dict[str, np.ndarray] = {}

    def walk(module, prefix):
        for kind in ("_parameters", "_buffers"):
            for name, value in getattr(module, kind, {}).items():
                if value is not None:
                    arrays[prefix + name] = _numpy(value)
        for name, child in getattr(module, "_modules", {}).items():
            walk(child, f"{prefix}{name}.")

    walk(shell, "")
    return arrays
