"""How parameters lie in tensors: the lines of a table that is read in both directions, and the plan of a file
of weights that is made by it.

A line's parameter may hold the tensors of several layers, stacked. No number changes on the way.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from opt_jax.convert.shards import Planned


@dataclass(frozen=True)
class Layout:
    """How a parameter, or its part for one layer, lies in a tensor. to_parameter also takes its shape."""

    to_tensor: Callable[[np.ndarray], np.ndarray]
    to_parameter: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]


SAME = Layout(lambda x: x, lambda x, shape: x)
FLAT = Layout(lambda x: x.reshape(-1), lambda x, shape: x.reshape(shape))
MATRIX = Layout(lambda x: x.reshape(len(x), -1).T, lambda x, shape: x.T.reshape(shape))  # [D, ...]
FROM_HEADS = Layout(lambda x: x.reshape(-1, x.shape[-1]).T, lambda x, shape: x.T.reshape(shape))  # [H, K, D]
CONVOLUTION = Layout(lambda x: x.transpose(2, 1, 0), lambda x, shape: x.transpose(2, 1, 0))


@dataclass(frozen=True)
class Pair:
    """A line of the table: a tensor's name and the parameter's path.

    A name with {} stands for one of each layer, where the parameter is stacked over layers. part: an index
    behind the layer, where the parameter holds several tensors; None in it takes all of an axis.
    """

    name: str
    path: str
    layout: Layout = SAME
    part: tuple[int | None, ...] = ()

    @property
    def stacked(self) -> bool:
        return "{}" in self.name

    def place(self, layer: int) -> tuple[int | None, ...]:
        """Index of the tensor's numbers in the parameter, as `Row.place` gives it."""
        return (layer, *self.part) if self.stacked else self.part


def tensors(
    lines: Iterable[Pair], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, Pair, tuple]]:
    """(name, line, index in the parameter) of every tensor, those of one parameter together.

    shapes: of the parameters by path.
    """
    for line in sorted(lines, key=lambda line: line.path):
        for layer in range(shapes[line.path][0] if line.stacked else 1):
            index = tuple(slice(None) if at is None else at for at in line.place(layer))
            yield line.name.format(layer), line, index


def planned(
    lines: Iterable[Pair], shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str]
) -> list[Planned]:
    """The tensors to write, in the order of `numbers`; shapes and dtypes: of the parameters by path."""

    def shape(line, index):
        return line.layout.to_tensor(np.empty(shapes[line.path], bool)[index]).shape

    return [
        Planned(name, shape(line, index), dtypes[line.path]) for name, line, index in tensors(lines, shapes)
    ]


def numbers(
    lines: Iterable[Pair], shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], np.ndarray]
) -> Iterator[np.ndarray]:
    """The numbers of each tensor; `read` gives a parameter by its path, and is asked once for each."""
    path, leaf = None, None
    for _, line, index in tensors(lines, shapes):
        if line.path != path:
            path, leaf = line.path, read(line.path)
        yield line.layout.to_tensor(leaf[index])
