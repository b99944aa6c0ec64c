"""Words of captions as the COCO caption server counts them.

Its evaluation (Chen et al. 2015, arXiv 1504.00325, section 3; code: pycocoevalcap) runs Stanford's
PTBTokenizer (CoreNLP 3.4.1, `-preserveLines -lowerCase`), then drops punctuation tokens. Java is replaced
here by one regular expression.

Kept from there, as it changes scores: clitics are words ("is n't", "dog 's"), hyphenated words, "1,000" and
"and/or" stay whole, "mr." and "u.s." keep their points, and symbols that are not on the server's list are
words too: %, $, &, #, brackets (as -lrb-, -rrb-, ...), "!!".

Different from there: rare contractions and abbreviations ('tis, y'all, rock'n'roll, univ.), emoticons, web
and mail addresses, tags in angle brackets, a sign or point before a number ("-5" is "5" here), runs of "*"
and "+", "AT&T" (three words here), sentences joined without a space. Letters that Unicode does not count as
word characters (vowel signs of Indian scripts) split words.
"""

import re
from collections.abc import Sequence

# Read as one token with their point, wherever they stand.
_ABBREVIATIONS = (
    "mr mrs ms dr prof st mt ave blvd rd jr sr vs etc inc co ltd corp ft sq gen col capt lt sgt sen rep gov "
    "jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu fri"
).split()
_CLITIC = r"(?:s|m|d|re|ve|ll)\b"
_TOKEN = re.compile(
    rf"""
    (?:{"|".join(_ABBREVIATIONS)}|no(?=\.\s*\d))\.      # mr. smith; no. 5, but "said no ."
    | (?:[^\W\d_]\.)+(?!\w)                             # u.s.  a.m.  plan b.
    | can(?=not\b) | (?:gon|wan)(?=na\b) | got(?=ta\b) | (?:gim|lem)(?=me\b)
    | \d+:\d+(?=[ap]m\b)                                # 2:50 | pm
    | '{_CLITIC} | '(?:em|\d0s)\b
    | \w+?(?=n't\b)                                     # do | n't
    | (?:(?<!\w)[#@](?=[^\W\d_]))?\w+                   # words and #tags; what may stand inside them:
      (?:(?:[-./] | (?<=\d)[,:](?=\d)                   # and/or  1,000  10:30
          | (?<=[^\W\d])'(?!{_CLITIC})(?=[^\W\d]))\w+)* # o'clock
    | [?!]{{2,}}
    | [^\w\s.,:;?!'"`“”‘–—…-]                           # any other symbol
    """,
    re.VERBOSE,
)
_RENAMED = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_RENAMED |= {"£": "#", "€": "$"}


def tokenize(text: str) -> list[str]:
    """Lower-case words of an English caption; see the module for what counts as one."""
    return [_RENAMED.get(token, token) for token in _TOKEN.findall(text.lower().replace("’", "'"))]


def tokenize_pairs(
    candidates: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[list[list[str]], list[list[list[str]]]]:
    """Words of n candidates and of the references, one or more for each.

    Raises:
      ValueError: nothing to score, differing numbers, one text where a list of references should be, no
        reference, or one without a word. A candidate may be empty.
    """
    if len(candidates) == 0:
        raise ValueError("no candidate captions to score")
    if len(candidates) != len(references):
        raise ValueError(f"{len(candidates)} candidate captions, but references for {len(references)}")
    return [tokenize(text) for text in candidates], tokenize_references(references)


def tokenize_references(references: Sequence[Sequence[str]]) -> list[list[list[str]]]:
    """Words of one or more references for each of n samples; a ValueError names an empty one."""
    tokens = []
    for i, sample in enumerate(references):
        if isinstance(sample, str):
            raise ValueError(f"references of caption {i} must be a list of texts, found one text {sample!r}")
        tokens.append([tokenize(text) for text in sample])
        if not tokens[-1] or not all(tokens[-1]):
            raise ValueError(f"caption {i} has an empty reference: {list(sample)!r}")
    return tokens
