"""The sets of modalities that a task shows the model, such as 'T+A': drawn for each row in training.

B rows of a batch; modalities are text, image, audio.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

LETTERS = "TIA"
NAMES = ("text", "image", "audio")


class InputSetError(ValueError):
    """A set of modalities that cannot be read, or that the data lack; the message names it."""


def parse(sets: Sequence[str]) -> np.ndarray:
    """('T', 'I+A') -> bool [2, 3]. Raises InputSetError."""
    rows = []
    for name in sets:
        letters = name.split("+")
        if not set(letters) <= set(LETTERS) or len(set(letters)) < len(letters):
            raise InputSetError(
                f"config.inputs {name!r}: expected some of T, I, A joined by '+', such as 'T+A'"
            )
        rows.append([letter in letters for letter in LETTERS])
    if not rows:
        raise InputSetError("config.inputs is empty: name at least one set of modalities, such as 'I'")
    return np.array(rows)


def named(keep: Sequence[bool]) -> str:
    """(True, False, True) -> 'text_audio', as in the keys of results."""
    return "_".join(name for name, kept in zip(NAMES, keep, strict=True) if kept)


def lettered(keep: Sequence[bool]) -> str:
    """(True, False, True) -> 'T+A'."""
    return "+".join(letter for letter, kept in zip(LETTERS, keep, strict=True) if kept)


def draw(key: jax.Array, sets: np.ndarray, weights: Sequence[float], present: jax.Array) -> jax.Array:
    """One of the sets for each row, bool [B, 3], of those that the row has whole; all False where none is.

    sets: bool [n, 3]. weights [n]: how often each is drawn, beside the others. present: bool [B, 3].
    """
    possible = (present[:, None] | ~sets).all(-1)  # [B, n]
    chosen = jax.random.categorical(key, jnp.where(possible, jnp.log(jnp.asarray(weights)), -jnp.inf))
    return jnp.asarray(sets)[chosen] & possible.any(-1, keepdims=True)


def demand(sets: np.ndarray, presence: np.ndarray, split: str) -> None:
    """Raises InputSetError where no row of a split has a set whole; presence is bool [N, 3]."""
    for keep in sets:
        if not presence[:, keep].all(1).any():
            lacking = named(keep).replace("_", " and ")
            raise InputSetError(
                f"no row of the {split} split has {lacking}, which this task needs together;"
                " set config.inputs to others, or config.data to data that have them"
            )
