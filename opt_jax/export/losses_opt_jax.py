"""What the model is trained by: the cross-entropy of texts and codes that it is to give, and that of classes.

Letters: B rows, N symbols, W words or codes, C classes.
"""

from torch import Tensor
from torch.nn import functional

from .configuration_opt_jax import IGNORED


def symbol_loss(logits: Tensor, symbols: Tensor) -> Tensor:
    """Mean of -log P over the symbols int [B, N] that are not IGNORED; logits [B, N, W]."""
    return functional.cross_entropy(logits.mT, symbols, ignore_index=IGNORED)


def class_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of logits [B, C] with labels [B, C] from 0 to 1, summed over the classes.

    Mean of the rows that have a label: one without any is a row that nobody labelled.
    """
    asked, labels = labels.any(1), labels.to(logits.dtype)
    each = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").sum(1)
    return (each * asked).sum() / asked.sum().clamp(min=1)


def check_symbols(name: str, symbols: Tensor | None, rows: int, most: int) -> None:
    """Raises ValueError unless these are [rows, N], N at most `most`, and something else than IGNORED.

    The latter only on the CPU: an accelerator would have to wait for the numbers.
    """
    if symbols is None:
        return
    if symbols.dim() != 2 or len(symbols) != rows or not 0 < symbols.shape[1] <= most:
        raise ValueError(f"{name} are {list(symbols.shape)}, expected [{rows}, N] with N from 1 to {most}")
    if symbols.device.type == "cpu" and not (symbols != IGNORED).any():
        raise ValueError(f"{name} are {IGNORED} everywhere, so that there is no loss; leave them out")


def check_classes(labels: Tensor | None, rows: int, classes: int) -> None:
    """Raises ValueError unless these are [rows, classes], and there is a classifier, of more than 0."""
    if labels is None:
        return
    if not classes:
        raise ValueError("class_labels need a classifier; load the model with num_labels=...")
    if list(labels.shape) != [rows, classes]:
        found = f"class_labels are {list(labels.shape)}, expected {[rows, classes]}"
        raise ValueError(f"{found}: 1 for each class that a row is of, 0 for the others")
