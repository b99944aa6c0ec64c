"""Published weights, by name, into a parameter tree: a table of rows, and a check that nothing is left over.

A kind of checkpoint is a list of `Row`s and the shapes that the module here asks for. `convert` fills every
parameter from the rows and refuses whatever is missing, unknown or of another shape, all of it at once.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from opt_jax.partitioning import path_name, unbox

SHOWN = 10


class ConversionError(ValueError):
    """The arrays are not those of the kind; `differences` has every one, the message the first ten."""

    def __init__(self, what: str, differences: list[str]):
        self.differences = differences
        more = len(differences) - SHOWN
        lines = [*differences[:SHOWN], *([f"and {more} more"] if more > 0 else [])]
        super().__init__(f"{what}: {len(differences)} differences\n  " + "\n  ".join(lines))


def unchanged(array: np.ndarray) -> np.ndarray:
    return array


def whole(_: re.Match) -> tuple:
    """The place of an array that is a parameter by itself."""
    return ()


def layer(match: re.Match) -> tuple:
    """The place in a parameter stacked over layers: the pattern's first group counts them."""
    return (int(match[1]),)


@dataclass(frozen=True)
class Row:
    """One line of a table.

    pattern: regular expression for whole published names. path: of the parameter here, its parts joined by
    '/', with the groups of the pattern (\\1); None leaves the array out on purpose. transform: of the array.
    place: where in the parameter the array goes: an index for each leading axis, None for all of it.
    """

    pattern: str
    path: str | None
    transform: Callable[[np.ndarray], np.ndarray] = unchanged
    place: Callable[[re.Match], tuple] = whole


def convert(
    arrays: Mapping[str, np.ndarray], rows: Iterable[Row], shapes: Mapping[str, tuple[int, ...]], what: str
) -> dict[str, np.ndarray]:
    """Parameters by path, each in the widest dtype of its arrays.

    Args:
      arrays: by published name. rows: the first that matches a name takes it. shapes: of the parameters that
        the module has, by path. what: names the source in errors.
    Raises: ConversionError: a name that no row takes, two for one place, a shape that does not fit, numbers
      that are no floats, a parameter that is not filled.
    """
    compiled = [(re.compile(row.pattern), row) for row in rows]
    parameters: dict[str, np.ndarray] = {}
    filled: dict[str, dict[tuple, tuple[str, int]]] = {path: {} for path in shapes}
    differences = []
    for name in sorted(arrays):
        matches = ((pattern.fullmatch(name), row) for pattern, row in compiled)
        match, row = next(((match, row) for match, row in matches if match), (None, None))
        if row is None:
            differences.append(f"{name} {list(arrays[name].shape)} is unknown")
        elif row.path is not None:
            problem = _fill(parameters, filled, arrays[name], name, match, row, shapes)
            differences += [problem] if problem else []
    for path, shape in shapes.items():
        written, size = sum(number for _, number in filled[path].values()), math.prod(shape)
        if written < size:
            part = f"{written} of its {size} numbers" if written else "nothing"
            differences.append(f"for {path} {list(shape)} there is {part}")
    if differences:
        raise ConversionError(what, differences)
    return parameters


def _fill(parameters, filled, array, name, match, row, shapes) -> str | None:
    """Puts one array into its place; returns what is wrong with it, if anything is."""
    path, place = match.expand(row.path), row.place(match)
    found = f"{name} {list(array.shape)}"
    if array.dtype.kind != "f":
        return f"{found} holds {array.dtype}, and parameters are floats"
    if path not in shapes:
        return f"{found} belongs to {path}, which the model does not have"
    wanted = f"{path} {list(shapes[path])}"
    if any(at is not None and at >= size for at, size in zip(place, shapes[path], strict=False)):
        return f"{found} is beyond {wanted}"
    if place in filled[path]:
        return f"{found} and {filled[path][place][0]} are both for {wanted}"
    index = tuple(slice(None) if at is None else at for at in place)
    room = np.broadcast_to(np.empty((), array.dtype), shapes[path])[index].shape
    try:
        value = row.transform(array)
    except ValueError:
        return f"{found} cannot become part of {wanted}"
    if value.shape != room:
        return f"{found} gives {list(value.shape)}, but {wanted} has room for {list(room)}"
    if path not in parameters:
        parameters[path] = np.zeros(shapes[path], array.dtype)
    wide = np.result_type(parameters[path].dtype, array.dtype)
    parameters[path] = parameters[path].astype(wide, copy=False)
    parameters[path][index] = value
    filled[path][place] = (name, value.size)
    return None


def shapes_of(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shapes by path of a tree of parameters as `init` gives it, boxed or not."""
    leaves = jax.tree_util.tree_flatten_with_path(unbox(tree))[0]
    return {path_name(path): leaf.shape for path, leaf in leaves}
