"""Whether the splits of a source are enough to be trained and evaluated on."""

from collections.abc import Mapping

import numpy as np

from opt_jax.data.mixture import row_weights
from opt_jax.data.triplet import Source, SourceError


def check_splits(sources: Mapping[str, Source], batch_size: int, validates: bool) -> None:
    """Raises SourceError for splits that training or evaluation would stumble over, hours later.

    validates: whether the losses are also taken of the validation split, in whole batches.
    """
    for split, source in sources.items():
        if not len(source):
            raise SourceError(f"the {split} split has no rows; give it a list, or hold more out (hold_out=N)")
        if "text" not in source.modalities or len(source.modalities) < 2:
            found = ", ".join(sorted(source.modalities)) or "nothing usable"
            raise SourceError(f"the {split} split has {found}; it needs texts with pictures or recordings")
        if extra := set(source.modalities) - set(sources["train"].modalities):
            found = ", ".join(sorted(extra))
            raise SourceError(f"the {split} split has {found}, which the train split has not")
    if short := too_few(len(sources["train"]), row_weights(sources["train"]), batch_size):
        raise SourceError(f"the train split has {short}")
    if validates and (rows := len(sources["validation"])) < batch_size:
        raise SourceError(
            f"the validation split has {rows} rows, which do not fill a batch of {batch_size}; set"
            " config.train.validate_every to 0, or hold more out (hold_out=N)"
        )


def too_few(rows: int, weights: np.ndarray | None, batch_size: int) -> str:
    """What to say where so many rows, or their weighted visits, do not fill a batch; else ''."""
    visits = rows if weights is None else int(weights.sum())
    if visits >= batch_size:
        return ""
    return (
        f"{visits} rows, which do not fill a batch; set config.train.batch_size, which is {batch_size}, to"
        " that at most"
    )
