"""Checkpoints: written by Orbax in the background, hashed leaf by leaf, refused when they do not fit.

Orbax does not notice a flipped bit. So each checkpoint carries one hash per leaf, computed on the devices
that hold it before it is written, and compared after it is read.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from opt_jax.configuration import differences
from opt_jax.partitioning import path_name


class FingerprintMismatch(ValueError):
    """A checkpoint was made with another cache, batch size, vocabulary or optimizer."""


class DamagedCheckpoint(ValueError):
    """A checkpoint cannot be read, or what was read is not what was written."""


@jax.jit  # leaf by leaf: one compilation for all of a shape, in place of one for each tree
def _leaf_hash(array: jax.Array) -> jax.Array:
    """sum over positions i of bits_i * (odd multiple of i), mod 2**32: uint32 scalar.

    Odd factors are invertible modulo 2**32, so any change of one element changes the sum; they differ from
    position to position, so exchanged elements do too. Integer sums agree in every order and on every mesh.
    """
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(array.dtype.itemsize, jnp.uint32)
    bits = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)  # 64-bit: a new last axis of 2
    position = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    return jnp.sum(bits * (position * jnp.uint32(0x9E3779B2) + jnp.uint32(1)), dtype=jnp.uint32)


def leaf_hashes(tree: Any) -> dict[str, int]:
    """path -> hash of the bits of every array in the tree."""
    paths, leaves = zip(*jax.tree_util.tree_flatten_with_path(tree)[0], strict=True)
    values = jax.device_get([_leaf_hash(leaf) for leaf in leaves])
    return {path_name(path): int(value) for path, value in zip(paths, values, strict=True)}


def _brief(error: Exception) -> str:
    """The readable beginning of an error of the storage library, which adds its whole configuration."""
    return f"{type(error).__name__}: {[*str(error).splitlines(), ''][0].split(' [', 1)[0][:400]}"


class Checkpoints:
    """The checkpoints of one training, in `directory`, of which the last `keep` stay.

    `fingerprint` (JSON-able) says what the training depends on; a checkpoint with another is refused.
    """

    def __init__(self, directory: Path, keep: int, fingerprint: Mapping[str, Any]):
        self.directory = Path(directory).absolute()
        self.fingerprint = json.loads(json.dumps(fingerprint))  # as it will be read: tuples become lists
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def latest(self) -> int | None:
        """The step of the newest checkpoint, None without one."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, host: Mapping[str, Any]) -> None:
        """Starts to write `state` (arrays) and `host` (JSON-able); returns once both are copied."""
        if step in self._manager.all_steps():
            return
        record = {"fingerprint": self.fingerprint, "hashes": leaf_hashes(state), "host": dict(host)}
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record))
        if not self._manager.save(step, args=items):
            raise RuntimeError(f"{self.directory}: step {step} was not saved; there is step {self.latest()}")

    def discard_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps."""
        for later in self._manager.all_steps():
            if later > step:
                self._manager.delete(later)

    def restore(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
        """(state, host) as saved; `abstract` gives shapes, dtypes and shardings, of any mesh.

        Raises FingerprintMismatch with the differences, or DamagedCheckpoint naming the leaf.
        """
        place = self.directory / str(step)
        earlier = [other for other in self._manager.all_steps() if other < step]
        remedy = f"Delete {place} to " + (f"go on from step {max(earlier)}" if earlier else "start anew")
        try:
            items = ocp.args.Composite(record=ocp.args.JsonRestore())
            record = self._manager.restore(step, args=items).record
        except Exception as error:
            raise DamagedCheckpoint(f"{place}: record cannot be read ({_brief(error)}). {remedy}") from error
        difference = differences(record["fingerprint"], self.fingerprint)
        if difference:
            raise FingerprintMismatch(
                f"{self.directory} holds a training made with other inputs (found -> wanted):\n  "
                + "\n  ".join(difference)
                + "\nUse another workdir, or delete the directory to start anew."
            )
        try:
            items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
            state = self._manager.restore(step, args=items).state
        except Exception as error:
            raise DamagedCheckpoint(f"{place}: state cannot be read ({_brief(error)}). {remedy}") from error
        found = leaf_hashes(state)
        damaged = [path for path, value in record["hashes"].items() if found.get(path) != value]
        if damaged:
            raise DamagedCheckpoint(f"{place}: not the bits that were saved: {', '.join(damaged)}. {remedy}")
        return state, record["host"]

    def wait(self) -> None:
        """Returns when everything saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self.wait()
        self._manager.close()


def restore_parameters(directory: Path, step: int | None = None) -> tuple[int, Any]:
    """(step, parameters) of a training, on the default device, without the rest of its state.

    Args:
      directory: that of a `Checkpoints`. step: by default the last.

    Raises FileNotFoundError where there is no such checkpoint; DamagedCheckpoint naming the leaf.
    """
    directory = Path(directory).absolute()
    steps = sorted(int(path.name) for path in directory.glob("*") if path.name.isdigit())
    step = step if step is not None or not steps else steps[-1]
    if step not in steps:
        raise FileNotFoundError(f"{directory} holds no checkpoint of step {step}; it has {steps}")
    try:
        # The handler itself: a Checkpointer would warn that a part of a step has no metadata of a whole one.
        place, reader = directory / str(step) / "state", ocp.PyTreeCheckpointHandler()
        shapes = reader.metadata(place).tree["params"]
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        arguments = jax.tree.map(lambda leaf: ocp.ArrayRestoreArgs(dtype=leaf.dtype, sharding=device), shapes)
        wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), shapes)
        options = {"item": {"params": wanted}, "restore_args": {"params": arguments}, "partial_restore": True}
        params = reader.restore(place, args=ocp.args.PyTreeRestore(**options))["params"]
        record = ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(directory / str(step) / "record")
    except Exception as error:
        raise DamagedCheckpoint(f"{directory / str(step)}: cannot be read ({_brief(error)})") from error
    saved, found = record["hashes"], leaf_hashes({"params": params})
    damaged = [path for path, value in found.items() if saved.get(path) != value]
    if damaged:
        names = ", ".join(damaged)
        raise DamagedCheckpoint(f"{directory / str(step)}: not the bits that were saved: {names}")
    return step, params


def abstract_state(shapes: Any, shardings: Any) -> Any:
    """ShapeDtypeStructs with shardings, as `Checkpoints.restore` wants them."""
    return jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), shapes, shardings)


def parameters_digest(params) -> str:
    """SHA-256 over all parameters, in the order of the tree."""
    total = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        total.update(np.ascontiguousarray(leaf).tobytes())
    return total.hexdigest()
