"""Axis names to shardings, on eight simulated devices."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from opt_jax.partitioning import (
    MESH_AXES,
    RULES,
    UnknownLogicalAxis,
    check_logical_axes,
    make_mesh,
    parameter_shardings,
    place_batch,
    unbox,
)


def boxed(shape, names):
    return nn.LogicallyPartitioned(jnp.zeros(shape), names)


def specification(shape, names):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    return parameter_shardings(mesh, {"w": boxed(shape, names)})["w"].spec


def test_every_rule_names_axes_of_the_mesh():
    for name, target in RULES.items():
        axes = (target,) if isinstance(target, str) else (target or ())
        assert set(axes) <= set(MESH_AXES), name


def test_an_unknown_name_raises_and_names_the_parameter():
    check_logical_axes({"a": boxed((2,), ("embed",)), "b": jnp.zeros(3)})
    with pytest.raises(UnknownLogicalAxis, match=r"a/kernel: 'embbed'"):
        check_logical_axes({"a": {"kernel": boxed((2, 2), ("embbed", None))}})


def test_names_become_mesh_axes():
    assert specification((4, 6), ("embed", "mlp")) == PartitionSpec(("fsdp",), ("tensor",))
    assert specification((3, 4, 6), ("layers", "embed", "mlp")) == PartitionSpec(None, ("fsdp",), ("tensor",))


def test_a_mesh_axis_serves_one_dimension_and_only_where_it_divides():
    assert specification((4, 4), ("vocab", "mlp")) == PartitionSpec(("tensor",), None)
    assert specification((5, 4), ("vocab", "embed")) == PartitionSpec(None, ("fsdp",))


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [((-1, 1, 1), (8, 1, 1)), ((-1, 2, 2), (2, 2, 2)), ((1, 1, 1), (1, 1, 1)), ((2, -1, 1), (2, 4, 1))],
)
def test_the_rest_of_the_devices(sizes, shape):
    mesh = make_mesh(dict(zip(MESH_AXES, sizes, strict=True)))
    assert tuple(mesh.shape.values()) == shape


@pytest.mark.parametrize("sizes", [(16, 1, 1), (-1, 3, 1), (-1, -1, 1), (0, 1, 1)])
def test_impossible_meshes_raise(sizes):
    with pytest.raises(ValueError, match="mesh"):
        make_mesh(dict(zip(MESH_AXES, sizes, strict=True)))


def test_batches_lie_over_data_and_fsdp():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    array = np.arange(24).reshape(8, 3)
    placed = place_batch(mesh, {"x": array})["x"]
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 3)}
    np.testing.assert_array_equal(placed, array)
    with pytest.raises(ValueError, match="'x' of shape .* 6 rows"):
        place_batch(mesh, {"x": np.zeros((6, 2))})


def test_unbox_adds_no_constraint():
    tree = {"a": boxed((3,), ("vocab",)), "b": jnp.ones(2)}  # 3 rows would not divide over the mesh
    with jax.set_mesh(make_mesh({"data": 4, "fsdp": 1, "tensor": 2})):
        plain = unbox(tree)
    assert [leaf.shape for leaf in jax.tree.leaves(plain)] == [(3,), (2,)]
