"""Where arrays live: a mesh of (data, fsdp, tensor) devices and one table from logical axis names to it.

Models name the axes of their parameters (`flax.linen.with_logical_partitioning`); nothing outside this file
knows which mesh axis a name stands for.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax.core import meta
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
RULES: dict[str, Any] = {
    "batch": BATCH_AXES,
    "vocab": "tensor",
    "code": "tensor",
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "kv": None,
    "layers": None,
    "position": None,
    "type": None,
    "feature": None,
    "class": None,
}


class UnknownLogicalAxis(ValueError):
    """A parameter names an axis that `RULES` does not know; it would silently stay unsharded."""


def make_mesh(config: Mapping[str, int], devices: list | None = None) -> Mesh:
    """The mesh of `config` (data, fsdp, tensor); one of them may be -1, "all remaining devices".

    Fewer devices than there are may be asked for; the first ones are taken. More raises ValueError.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config[axis] for axis in MESH_AXES]
    known = int(np.prod([size for size in sizes if size != -1]))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"mesh {dict(config)}: sizes are positive, and at most one is -1")
    if -1 in sizes and len(devices) % known:
        raise ValueError(f"mesh {dict(config)}: {len(devices)} devices cannot be divided by {known}")
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    count = int(np.prod(sizes))
    if count > len(devices):
        raise ValueError(f"mesh {dict(config)} needs {count} devices, found {len(devices)}")
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:count])


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
    """Axis 0 over data and fsdp, the rest whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def path_name(path: tuple) -> str:
    """A tree path as one name: `encoder/attention/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def is_boxed(leaf: Any) -> bool:
    return isinstance(leaf, meta.AxisMetadata)


def unbox(tree: Any) -> Any:
    """The tree without its boxes of axis names. Unlike `flax.linen.unbox` it adds no sharding constraint."""
    return jax.tree.map(lambda leaf: leaf.value if is_boxed(leaf) else leaf, tree, is_leaf=is_boxed)


def logical_axes(tree: Any) -> dict[str, tuple[str | None, ...]]:
    """Axis names of every parameter by its path; a parameter without a box has none, all axes whole."""
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_boxed)[0]
    return {path_name(path): leaf.names if is_boxed(leaf) else (None,) * leaf.ndim for path, leaf in leaves}


def check_logical_axes(params_boxed: Any) -> None:
    """Raises UnknownLogicalAxis naming the parameters whose axis names have no rule."""
    unknown = [
        f"{path}: {name!r}"
        for path, names in logical_axes(params_boxed).items()
        for name in names
        if name is not None and name not in RULES
    ]
    if unknown:
        raise UnknownLogicalAxis(
            f"axis names without a rule: {', '.join(unknown)}. Known are {sorted(RULES)} (partitioning.RULES)"
        )


def _specification(mesh: Mesh, shape: tuple[int, ...], names: tuple[str | None, ...]) -> PartitionSpec:
    """One mesh axis serves one dimension, the first that asks; a size that it does not divide stays whole."""
    spec: list[Any] = []
    for size, name in zip(shape, names, strict=True):
        target = RULES[name] if name else None
        axes = (target,) if isinstance(target, str) else (target or ())
        used = {axis for entry in spec if entry for axis in entry}
        free = not used.intersection(axes)
        divides = size % int(np.prod([mesh.shape[axis] for axis in axes])) == 0
        spec.append(axes if axes and free and divides else None)
    return PartitionSpec(*spec)


def parameter_shardings(mesh: Mesh, params_boxed: Any) -> Any:
    """A NamedSharding for every leaf of the unboxed tree; `params_boxed` may come from eval_shape."""
    check_logical_axes(params_boxed)
    axes = logical_axes(params_boxed)

    def sharding(path, leaf):
        return NamedSharding(mesh, _specification(mesh, leaf.shape, axes[path_name(path)]))

    return jax.tree_util.tree_map_with_path(sharding, unbox(params_boxed))


def place_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Host arrays to devices, axis 0 over (data, fsdp). With many processes each brings its own rows."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    sharding = over_batch(mesh)
    placed = {}
    for name, array in batch.items():
        array = np.asarray(array)
        rows = array.shape[0] * jax.process_count() if array.ndim else 0
        if not array.ndim or rows % shards:
            raise ValueError(
                f"batch array {name!r} of shape {array.shape}: its {rows} rows do not divide over {shards} "
                f"devices (mesh {dict(mesh.shape)}). Choose another batch size or a smaller mesh"
            )
        if jax.process_count() > 1:
            placed[name] = jax.make_array_from_process_local_data(sharding, array)
        else:
            placed[name] = jax.device_put(array, sharding)
    return placed
