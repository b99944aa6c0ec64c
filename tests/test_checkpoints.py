"""Checkpoints are hashed, refused when they do not fit, and readable on another mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opt_jax.checkpoints import (
    Checkpoints,
    DamagedCheckpoint,
    FingerprintMismatch,
    abstract_state,
    leaf_hashes,
    restore_parameters,
)
from opt_jax.partitioning import make_mesh, over_batch, replicated

FINGERPRINT = {"cache": {"sha256": "a1", "shape": (2, 3)}, "batch_size": 8}


def state(sharding):
    generator = np.random.default_rng(0)
    tree = {
        "dense": {"kernel": generator.standard_normal((8, 2048)).astype(np.float32)},
        "half": generator.standard_normal((8, 3)).astype(np.float16),
        "step": np.array(5, np.int32),
    }
    place = lambda leaf: jax.device_put(leaf, sharding if leaf.ndim else replicated(MESH))  # noqa: E731
    return jax.tree.map(place, tree)


MESH = make_mesh({"data": 4, "fsdp": 2, "tensor": 1})


def saved(directory, keep=2, steps=(5,)):
    checkpoints = Checkpoints(directory, keep, FINGERPRINT)
    for step in steps:
        checkpoints.save(step, state(over_batch(MESH)), {"best": float("inf"), "since": 3})
    checkpoints.wait()
    return checkpoints


def abstract(sharding):
    tree = state(sharding)
    return abstract_state(tree, jax.tree.map(lambda leaf: leaf.sharding, tree))


def test_what_was_saved_comes_back_on_another_mesh(tmp_path):
    checkpoints = saved(tmp_path, steps=(3, 4, 5))
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.isdigit()) == ["4", "5"]
    assert checkpoints.latest() == 5
    other = Checkpoints(tmp_path, 2, FINGERPRINT)
    restored, host = other.restore(5, abstract(replicated(MESH)))
    assert host == {"best": float("inf"), "since": 3}
    assert restored["dense"]["kernel"].sharding.is_fully_replicated
    jax.tree.map(np.testing.assert_array_equal, restored, state(replicated(MESH)))


def test_another_fingerprint_is_refused_with_the_difference(tmp_path):
    saved(tmp_path).close()
    wanted = {"cache": {"sha256": "b2", "shape": (2, 3)}, "vocabulary": 30}
    with pytest.raises(FingerprintMismatch) as refused:
        Checkpoints(tmp_path, 2, wanted).restore(5, abstract(over_batch(MESH)))
    assert "batch_size: 8 -> absent" in str(refused.value)
    assert 'cache.sha256: "a1" -> "b2"' in str(refused.value)
    assert "vocabulary: absent -> 30" in str(refused.value)
    assert "shape" not in str(refused.value)


def _files(directory):
    files = (path for path in directory.rglob("*") if path.is_file())
    return sorted(files, key=lambda path: path.stat().st_size)


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def test_a_flipped_byte_in_an_array_is_found_and_named(tmp_path):
    """Orbax alone reads this checkpoint without complaint."""
    saved(tmp_path, steps=(4, 5)).close()
    _flip(_files(tmp_path / "5/state")[-1])
    with pytest.raises(DamagedCheckpoint, match=r"saved: dense/kernel\. Delete .*/5 to go on from step 4"):
        Checkpoints(tmp_path, 2, FINGERPRINT).restore(5, abstract(over_batch(MESH)))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of the storage library
def test_an_unreadable_record_or_state_is_found(tmp_path):
    saved(tmp_path).close()
    (tmp_path / "5/record/metadata").write_text("{")
    with pytest.raises(DamagedCheckpoint, match=r"record cannot be read .* Delete .*/5 to start anew"):
        Checkpoints(tmp_path, 2, FINGERPRINT).restore(5, abstract(over_batch(MESH)))
    saved(tmp_path / "other").close()
    _files(tmp_path / "other/5/state")[-1].unlink()
    with pytest.raises(DamagedCheckpoint, match="state cannot be read"):
        Checkpoints(tmp_path / "other", 2, FINGERPRINT).restore(5, abstract(over_batch(MESH)))


def test_parameters_alone_come_back_on_one_device(tmp_path):
    checkpoints = Checkpoints(tmp_path, 2, FINGERPRINT)
    tree = state(over_batch(MESH))
    for step in (4, 5):
        whole = {"params": jax.tree.map(lambda x, s=step: x * s, tree), "optimizer": {"mu": tree["dense"]}}
        checkpoints.save(step, whole, {})
    checkpoints.wait()
    for asked, step in ((None, 5), (4, 4)):
        found, params = restore_parameters(tmp_path, asked)
        assert found == step
        jax.tree.map(lambda x, y, s=step: np.testing.assert_array_equal(x, np.asarray(y) * s), params, tree)
        assert all(len(leaf.devices()) == 1 for leaf in jax.tree.leaves(params))
    with pytest.raises(FileNotFoundError, match=r"holds no checkpoint of step 3; it has \[4, 5\]"):
        restore_parameters(tmp_path, 3)
    for path in _files(tmp_path / "5/state")[-3:]:
        _flip(path)
    with pytest.raises(DamagedCheckpoint, match="5: "):
        restore_parameters(tmp_path)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16, np.int32, np.bool_, np.uint8])
def test_a_hash_sees_every_change(dtype):
    array = (np.arange(24).reshape(4, 6) % 2).astype(dtype)
    (original,) = leaf_hashes([jnp.asarray(array)]).values()
    changed, exchanged = array.copy(), array.copy()
    changed[2, 1] = 0
    exchanged[[0, 1], [0, 1]] = exchanged[[0, 1], [1, 0]][::-1]
    exchanged[0, :2] = array[0, 1::-1]
    for other in (changed, exchanged):
        assert leaf_hashes([jnp.asarray(other)])["0"] != original


def test_hashes_do_not_depend_on_the_mesh():
    assert leaf_hashes(state(over_batch(MESH))) == leaf_hashes(state(replicated(MESH)))


def test_the_hash_is_the_weighted_sum_it_claims_to_be():
    array = np.array([1.5, -2.0, 3.25], np.float32)
    factors = np.arange(3, dtype=np.uint32) * np.uint32(0x9E3779B2) + np.uint32(1)
    wanted = int(np.sum(array.view(np.uint32) * factors, dtype=np.uint32))
    assert leaf_hashes({"a": jnp.asarray(array)}) == {"a": wanted}
