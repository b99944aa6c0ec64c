"""Speech recognition: word and character error rate (OPT, arXiv 2107.00249, table 4)."""

import re
from collections.abc import Sequence

import jiwer

_NOT_SPOKEN = re.compile(r"[^\w\s']|_")


def normalise(text: str) -> str:
    """What can be heard: lower case, no punctuation but apostrophes, all of one kind, single spaces."""
    return " ".join(_NOT_SPOKEN.sub(" ", text.lower().replace("\u2019", "'")).split())


def error_rates(references: Sequence[str], hypotheses: Sequence[str]) -> dict[str, float]:
    """{"WER": ..., "CER": ...} in percent: edits over the whole set by its reference words or characters.

    Both sides are normalised first. Rates can exceed 100. An empty hypothesis is all deletions.
    """
    if len(references) == 0:
        raise ValueError("no transcripts to score")
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} reference transcripts, but {len(hypotheses)} hypotheses")
    references, hypotheses = (
        [normalise(text) for text in references],
        [normalise(text) for text in hypotheses],
    )
    if "" in references:
        raise ValueError(f"reference transcript {references.index('')} is empty")
    return {
        "WER": 100.0 * jiwer.wer(references, hypotheses),
        "CER": 100.0 * jiwer.cer(references, hypotheses),
    }
