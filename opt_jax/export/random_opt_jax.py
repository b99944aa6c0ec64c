"""The random numbers of JAX, so that a seed draws the same picture in both: Threefry-2x32 (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", 2011) and what `jax.random` makes of its bits."""

import numpy as np

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = np.uint32(0x1BD11BDA)


def threefry(key: tuple[int, int], high: np.ndarray, low: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two words, uint32 [n] each, for the counters (high, low) uint32 [n]."""
    first, second = (np.uint32(word) for word in key)
    keys = (first, second, first ^ second ^ PARITY)
    with np.errstate(over="ignore"):
        x, y = high + first, low + second
        for group in range(5):
            for rotation in ROTATIONS[group % 2]:
                x = x + y
                y = (y << np.uint32(rotation)) | (y >> np.uint32(32 - rotation))
                y = y ^ x
            x = x + keys[(group + 1) % 3]
            y = y + keys[(group + 2) % 3] + np.uint32(group + 1)
    return x, y


def gumbel(seed: int, step: int, shape: tuple[int, ...]) -> np.ndarray:
    """float32 of this shape: `jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), step), shape)`.

    Raises: ValueError: the seed is not from 0 to 2^31 - 1.
    """
    if not 0 <= seed < 2**31:
        raise ValueError(f"the seed is {seed}; choose one from 0 to {2**31 - 1}")
    zero = np.zeros(1, np.uint32)
    key = threefry((0, seed), zero, zero + np.uint32(step))
    counter = np.arange(np.prod(shape), dtype=np.uint32)
    high, low = threefry((key[0][0], key[1][0]), np.zeros_like(counter), counter)
    bits = (high ^ low) >> np.uint32(9) | np.float32(1).view(np.uint32)
    tiny = np.finfo(np.float32).tiny
    uniform = np.maximum(bits.view(np.float32) - np.float32(1), tiny)
    return (-np.log(-np.log(uniform))).reshape(shape)
