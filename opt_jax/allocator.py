"""Lets the C library keep the memory that a step frees, for the next step."""

import ctypes
import sys

# Parameters of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8
TOP_PAD = 256 << 20


def keep_freed_memory() -> bool:
    """Tells glibc not to return freed memory to the system; True where it understood.

    XLA's CPU backend allocates every temporary of a step anew. By default glibc maps large blocks one by one
    and unmaps them when freed, so that each step pays for the page faults of all its memory again: half the
    time of a step of `base` size. Call it before the first computation. Elsewhere than on Linux with glibc
    nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    settings = ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, TOP_PAD))
    return all([mallopt(name, value) for name, value in settings])
