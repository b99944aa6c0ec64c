"""Configuration files: loading one by path, and refusing overrides that do not fit it, in one line each."""

import ast
import difflib
import importlib.util
import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

# What a configuration has that can be run: every one, and one of a pre-training.
RUN = ("workdir", "seed", "distributed")
PRETRAINING = ("data", "encoders", "cache", "loader", "model", "objectives", "train", "evaluation")


class ConfigError(ValueError):
    """The user's configuration is wrong; each line of the message names one problem and what to do."""


def load(path: str | Path, *variant: str) -> ConfigDict:
    """What `get_config(*variant)` in the file at `path` returns.

    Configuration files load each other through this too, by a path next to their own, so that they work from
    any directory.

    Raises:
      ConfigError: no such file, no `get_config` in it, or a variant that it does not know.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no configuration file {str(path)!r}{nearest(str(path), _configs_beside(path))}")
    spec = importlib.util.spec_from_file_location(f"{path.stem}_config", path)
    if spec is None:
        raise ConfigError(f"{path}: a configuration is a Python file, with a name that ends in .py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{path} defines no get_config(); it is not a configuration")
    try:
        inspect.signature(module.get_config).bind(*variant)
    except TypeError as error:
        told = f"has no variants; leave ':{variant[0]}' out" if variant else f"needs a variant: {path}:NAME"
        raise ConfigError(f"{path} {told}") from error
    return module.get_config(*variant)


def check_whole(config: ConfigDict, path: str) -> None:
    """Refuses what only other configurations load, as that of an encoder. Raises ConfigError."""
    needed = RUN if "task" in config else (*RUN, *PRETRAINING)
    if missing := [name for name in needed if name not in config]:
        raise ConfigError(
            f"{path} cannot be run: it has no {', '.join(missing)}; name a whole configuration, such as"
            " configs/pretrain.py"
        )
    if config.get("task") == "":
        beside = [name for name in sorted(_configs_beside(Path(path))) if name != str(path)]
        raise ConfigError(f"{path} names no task; choose from those that load it: {', '.join(beside)}")


def choose(variant: str, variants: Mapping[str, Any]) -> Any:
    """variants[variant]; a ConfigError that lists them all if there is no such variant."""
    if variant not in variants:
        known = ", ".join(variants)
        raise ConfigError(f"unknown variant {variant!r}{nearest(variant, variants)} (variants: {known})")
    return variants[variant]


def check_overrides(config: ConfigDict, arguments: Sequence[str]) -> None:
    """Refuses what `--config.<field>=<value>` arguments get wrong: fields that are not there, wrong types.

    Args:
      config: as loaded, before any override.
      arguments: the command line; what does not start with --config. is skipped.

    Raises:
      ConfigError: one line for each wrong argument.
    """
    leaves = flatten(config)
    problems = []
    for position, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        name = name.lstrip("-") if name.startswith("-") else ""
        negated = name.startswith("noconfig.")
        name = name.removeprefix("no") if negated else name
        if not name.startswith("config."):
            continue
        field = name.removeprefix("config.")
        if field not in leaves:
            problems.append(_unknown(field, leaves))
            continue
        if not equals and not isinstance(leaves[field], bool):
            value = arguments[position + 1] if position + 1 < len(arguments) else ""
        if not (isinstance(leaves[field], bool) and (negated or not equals)):
            problems += _wrong_type(field, leaves[field], value)
    if problems:
        raise ConfigError("\n".join(problems))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'a.b.c': leaf} of nested mappings; an empty mapping is a leaf."""
    flat = {}
    for key in tree:
        value = tree[key]
        if isinstance(value, Mapping | ConfigDict) and len(value):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """One line for each flat key whose values differ as JSON: 'key: found -> wanted'."""
    found, wanted = (flatten(json.loads(json.dumps(tree))) for tree in (found, wanted))

    def show(tree, key):
        return json.dumps(tree[key]) if key in tree else "absent"

    return [
        f"{key}: {show(found, key)} -> {show(wanted, key)}"
        for key in sorted(found.keys() | wanted.keys())
        if show(found, key) != show(wanted, key)
    ]


def _configs_beside(path: Path) -> list[str]:
    return [str(other) for other in path.parent.glob("*.py")] if path.parent.is_dir() else []


def nearest(name: str, names: Iterable[str]) -> str:
    """'; did you mean ...?' with the most similar of `names`, or '' where none is similar."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _unknown(field: str, leaves: Mapping[str, Any]) -> str:
    below = [leaf for leaf in leaves if leaf.startswith(field + ".")]
    if below:
        return f"'config.{field}' is a group of fields; set one of them, such as --config.{below[0]}=..."
    # The right last name in the wrong group is nearer than a similar spelling of the whole.
    group, _, last = field.rpartition(".")
    siblings = [leaf for leaf in leaves if leaf.rpartition(".")[0] == group]
    namesakes = [leaf for leaf in leaves if leaf.rpartition(".")[2] == last]
    for names in (siblings, namesakes, leaves):
        close = difflib.get_close_matches(field, names, n=1, cutoff=0.5)
        if close:
            return f"unknown config field 'config.{field}'; did you mean 'config.{close[0]}'?"
    return f"unknown config field 'config.{field}' (fields of config: {', '.join(_first_names(leaves))})"


def _first_names(leaves: Iterable[str]) -> list[str]:
    return sorted({leaf.partition(".")[0] for leaf in leaves})


def _wrong_type(field: str, default: Any, text: str) -> list[str]:
    expected = f"a tuple such as '{default}'" if isinstance(default, tuple) else type(default).__name__
    try:
        if isinstance(default, bool):
            good = text.lower() in ("true", "t", "1", "false", "f", "0")
        elif isinstance(default, int):
            good = int(text, 10) is not None
        elif isinstance(default, float):
            good = float(text) is not None
        elif isinstance(default, tuple):
            value = ast.literal_eval(text)
            kinds = {type(item) for item in default}
            good = isinstance(value, tuple) and all(type(item) in kinds for item in value)
        else:
            good = True
    except (ValueError, SyntaxError):
        good = False
    return [] if good else [f"config.{field} expects {expected}, got {text!r}"]
