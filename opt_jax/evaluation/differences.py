"""Word differences between what is true and what a model said."""

import difflib
import re
from collections.abc import Sequence


def word_differences(truth: str, said: str) -> list[tuple[str, str]]:
    """The words of both in order, as (kind, words) with kind "same", "missing" (in truth only) or "extra".

    Case and punctuation make no difference.
    """
    truth_words, said_words = truth.split(), said.split()
    matcher = _matcher(truth_words, said_words)
    result = []
    for tag, i, j, k, m in matcher.get_opcodes():
        if tag == "equal":
            result.append(("same", " ".join(said_words[k:m])))
            continue
        if j > i:
            result.append(("missing", " ".join(truth_words[i:j])))
        if m > k:
            result.append(("extra", " ".join(said_words[k:m])))
    return result


def closest(references: Sequence[str], said: str) -> str:
    """The reference with the most words in common with what was said, in order."""
    return max(references, key=lambda reference: _matcher(reference.split(), said.split()).ratio())


def _matcher(truth: list[str], said: list[str]) -> difflib.SequenceMatcher:
    bare = [[re.sub(r"[^\w']", "", word.lower()) for word in words] for words in (truth, said)]
    return difflib.SequenceMatcher(None, *bare, autojunk=False)
