"""Names of a cache's samples, in as many bytes as they have: one long name costs the others nothing."""

from collections.abc import Mapping, Sequence

import numpy as np


def pack(ids: Sequence[str]) -> dict[str, np.ndarray]:
    """{"id_text": uint8 [their UTF-8 after one another], "id_bytes": int32 [N], length of each}."""
    texts = [name.encode() for name in ids]
    return {
        "id_text": np.frombuffer(b"".join(texts), np.uint8),
        "id_bytes": np.array([len(text) for text in texts], np.int32),
    }


class Ids(Sequence):
    """What `pack` made of N names, read one by one."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self._text = arrays["id_text"]
        self._ends = np.concatenate([[0], np.cumsum(arrays["id_bytes"], dtype=np.int64)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, row: int) -> str:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return self._text[self._ends[row] : self._ends[row + 1]].tobytes().decode()
