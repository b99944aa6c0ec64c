"""Which rows make which batch: a pure function of (seed, epoch, lengths, presence), the same on every host.

Rows of similar length share a batch, in a few fixed shapes, so that little is computed on padding and few
programs are compiled. Every epoch visits every row once, or as often as its weight says, but for the rest of
the visits divided by batch_size: those are drawn at random and left out.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of one batch (int [B]), and the lengths they are padded or cut to: T word pieces, A stacked
    audio positions."""

    indices: np.ndarray
    text_length: int
    audio_length: int


def steps_per_epoch(num_rows: int, batch_size: int, weights: np.ndarray | None = None) -> int:
    """Batches of every epoch. Raises ValueError when there are fewer visits than a batch holds."""
    if weights is not None:
        num_rows = int(math.fsum(weights))
    if num_rows < batch_size:
        raise ValueError(f"{num_rows} rows do not fill one batch of {batch_size}; use a smaller batch_size")
    return num_rows // batch_size


def plan_epoch(
    seed: int,
    epoch: int,
    text_lengths: np.ndarray,
    audio_lengths: np.ndarray,
    presence: np.ndarray,
    batch_size: int,
    buckets: Sequence[tuple[int, int]],
    weights: np.ndarray | None = None,
) -> list[Batch]:
    """The batches of one epoch, in order.

    Args:
      seed, epoch: the only sources of randomness.
      text_lengths: int [N], word pieces with [CLS] and [SEP].
      audio_lengths: int [N], stacked positions.
      presence: bool [N, 3] for text, image, audio; an absent modality counts one position of text ([CLS]),
        none of audio.
      batch_size: rows in a batch.
      buckets: (T, A) pairs that grow in both; a row goes to the first that holds it, to the last if none
      does.
      weights: float [N], visits of each row in an epoch, on average; None is one each.

    Returns:
      N // batch_size batches (with weights: their sum // batch_size) of `batch_size` rows each, different
      ones unless a weight is above 1. Rows that do not fill a batch of their bucket move up to the next one,
      where they fit as well.

    Raises:
      ValueError: the buckets do not grow, or N < batch_size.
    """
    num_batches = steps_per_epoch(len(text_lengths), batch_size, weights)
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch])))
    # What is left out is drawn before the buckets: left out after them, it would always be the longest rows.
    rows = random.permutation(len(text_lengths))
    if weights is not None:
        rows = random.permutation(np.repeat(rows, visits(weights[rows], random.random())))
    rows = rows[: num_batches * batch_size]
    assigned = _assign(text_lengths, audio_lengths, presence, buckets)[rows]
    batches = []
    carried = rows[:0]
    for bucket, (text_length, audio_length) in enumerate(buckets):
        members = np.concatenate([carried, rows[assigned == bucket]])
        full = len(members) // batch_size * batch_size
        carried = members[full:]
        for indices in members[:full].reshape(-1, batch_size):
            batches.append(Batch(indices, text_length, audio_length))
    return [batches[position] for position in random.permutation(num_batches)]


def visits(weights: np.ndarray, start: float) -> np.ndarray:
    """How often each row is visited, int [N]: systematic sampling.

    Points start, start + 1, start + 2, ... with `start` in [0, 1) fall on rows as wide as their weights: each
    row gets its weight rounded up or down, on average over `start` its weight, and the sum is that of the
    weights, rounded up or down.
    """
    edges = np.append(0, np.cumsum(weights, dtype=np.float64))
    edges[-1] = math.fsum(weights)  # the same in every order of rows
    return np.diff(np.maximum(np.ceil(edges - start), 0)).astype(np.int64)


def report(
    batches: Sequence[Batch], text_lengths: np.ndarray, audio_lengths: np.ndarray, presence: np.ndarray
) -> dict[str, float]:
    """What a plan wastes and cuts.

    Returns:
      padded_fraction: share of text and audio positions that are padding; truncated_text, truncated_audio:
      rows that lose their end; left_out: rows of the split that are in no batch; batches; shapes: different
      (T, A).
    """
    text, audio = effective_lengths(text_lengths, audio_lengths, presence)
    positions = used = truncated_text = truncated_audio = 0
    for batch in batches:
        rows = batch.indices
        positions += len(rows) * (batch.text_length + batch.audio_length)
        used += np.minimum(text[rows], batch.text_length).sum()
        used += np.minimum(audio[rows], batch.audio_length).sum()
        truncated_text += int((text[rows] > batch.text_length).sum())
        truncated_audio += int((audio[rows] > batch.audio_length).sum())
    return {
        "padded_fraction": float(1 - used / max(positions, 1)),
        "truncated_text": truncated_text,
        "truncated_audio": truncated_audio,
        "left_out": len(text) - sum(len(batch.indices) for batch in batches),
        "batches": len(batches),
        "shapes": len({(batch.text_length, batch.audio_length) for batch in batches}),
    }


def host_slice(indices: np.ndarray, process_index: int, process_count: int) -> np.ndarray:
    """The contiguous part of a batch that one host loads; in the order of hosts they make up the batch.

    Raises ValueError when the hosts do not divide the batch.
    """
    if len(indices) % process_count:
        raise ValueError(f"a batch of {len(indices)} rows cannot be cut evenly for {process_count} hosts")
    size = len(indices) // process_count
    return indices[process_index * size : (process_index + 1) * size]


def effective_lengths(
    text_lengths: np.ndarray, audio_lengths: np.ndarray, presence: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Positions a row takes, [N] each: [CLS] stands alone where text is absent, absent audio takes none."""
    return np.where(presence[:, 0], text_lengths, 1), np.where(presence[:, 2], audio_lengths, 0)


def stacked_length(frame_counts: np.ndarray | int, stack: int) -> np.ndarray | int:
    """Audio positions of raw frames when `stack` of them make one; the last one may be filled up."""
    return -(-frame_counts // stack)


def _assign(text_lengths, audio_lengths, presence, buckets) -> np.ndarray:
    """Number of the bucket of every row, [N]."""
    limits = np.asarray(buckets)
    if limits.ndim != 2 or limits.shape[1] != 2 or not len(limits) or (np.diff(limits, axis=0) < 0).any():
        raise ValueError(f"buckets are {buckets}; expected (text, audio) lengths that grow in both")
    text, audio = effective_lengths(text_lengths, audio_lengths, presence)
    fits = (text[:, None] <= limits[:, 0]) & (audio[:, None] <= limits[:, 1])
    return np.where(fits.any(axis=1), fits.argmax(axis=1), len(limits) - 1)
