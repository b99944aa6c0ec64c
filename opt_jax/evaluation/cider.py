"""CIDEr and CIDEr-D x 100 (Vedantam et al. 2015, arXiv 1411.5726).

Each caption is four vectors, one for each n = 1..4: how often it has an n-gram, times the logarithm of how
many documents there are for each that has the n-gram. A document is all the references of one sample. Words
are those of `caption_tokens`, not stemmed, as in the evaluation servers.

    python -m opt_jax.evaluation.cider karpathy:dataset_coco.json,images=coco --split=train --out=coco.json

counts in how many documents of a source each n-gram is, for --config.evaluation.document_frequencies of
configs/finetune/captioning.py.
"""

import argparse
import contextlib
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from opt_jax.evaluation.caption_tokens import tokenize, tokenize_pairs, tokenize_references

MAX_ORDER = 4
LENGTH_DEVIATION = 6.0  # sigma of the Gaussian length penalty of CIDEr-D, in words

Vector = Mapping[str, float]
Frequencies = Mapping[str, object] | str | os.PathLike


def cider(
    candidates: Sequence[str], references: Sequence[Sequence[str]], frequencies: Frequencies | None = None
) -> float:
    """CIDEr x 100: mean cosine of the vectors over samples, references and n (eq. 1-3); at most 100.

    candidates: n texts, an empty one scores 0; references: for each, one or more texts. frequencies: what
    `document_frequencies` gives, or a JSON file of it; by default the references' own, which make every
    weight, and so the score, 0 where there is one sample alone. Bad input is a ValueError, see
    `caption_tokens.tokenize_pairs`.
    """
    return 100.0 * _mean_similarity(candidates, references, frequencies, _cosine)


def cider_d(
    candidates: Sequence[str], references: Sequence[Sequence[str]], frequencies: Frequencies | None = None
) -> float:
    """CIDEr-D x 100: clipped counts, length penalty, factor 10 (eq. 4); at most 1000.

    What evaluation servers and papers call CIDEr. Arguments as in `cider`.
    """
    return 1000.0 * _mean_similarity(candidates, references, frequencies, _penalised_cosine)


def document_frequencies(references: Sequence[Sequence[str]]) -> dict[str, object]:
    """{"documents": n, "frequencies": {"a": ..., "a red": ...}}: in how many samples each n-gram is.

    references: for each of n samples, one or more texts. N-grams are words with single spaces between;
    `json.dump` writes what `cider` reads.
    """
    return _document_frequencies([_ngrams(text) for text in s] for s in tokenize_references(references))


def _ngrams(tokens: Sequence[str]) -> list[Counter]:
    """Counts of the n-grams of each order, 1 to 4."""
    return [
        Counter(" ".join(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
        for n in range(1, MAX_ORDER + 1)
    ]


def _document_frequencies(samples: Iterable[Sequence[list[Counter]]]) -> dict[str, object]:
    frequencies, number = Counter(), 0
    for sample in samples:
        number += 1
        frequencies.update({ngram for text in sample for order in text for ngram in order})
    return {"documents": number, "frequencies": dict(frequencies)}


def read_frequencies(path: str | os.PathLike) -> Mapping[str, object]:
    """Those of a JSON file. Raises ValueError, naming the file."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no document frequencies can be read ({error})") from error
    return _checked(found, str(path))


def _checked(frequencies: object, source: str) -> Mapping[str, object]:
    counts = frequencies.get("frequencies") if isinstance(frequencies, Mapping) else None
    numbers = [frequencies.get("documents"), *counts.values()] if isinstance(counts, Mapping) else [None]
    if not all(isinstance(number, int) for number in numbers):
        raise ValueError(
            f"{source}: expected the keys 'documents' and 'frequencies' of document_frequencies, and whole"
            " numbers"
        )
    documents, most = numbers[0], max(numbers[1:], default=0)
    if documents < max(most, 1):
        raise ValueError(f"{source}: an n-gram in {most} of {documents} documents")
    return frequencies


def _mean_similarity(
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
    frequencies: Frequencies | None,
    similarity: Callable[[Vector, Vector, int], float],
) -> float:
    """Mean of similarity(candidate's vector, reference's, difference in words), n by n."""
    candidate_tokens, reference_tokens = tokenize_pairs(candidates, references)
    samples = [[_ngrams(tokens) for tokens in sample] for sample in reference_tokens]
    if frequencies is None:
        known = _document_frequencies(samples)
    elif isinstance(frequencies, Mapping):
        known = _checked(frequencies, "document frequencies")
    else:
        known = read_frequencies(frequencies)

    def vectors(orders: list[Counter]) -> list[dict[str, float]]:
        # An n-gram that no document has counts as one of a single document.
        return [
            {
                ngram: count * math.log(known["documents"] / max(known["frequencies"].get(ngram, 0), 1))
                for ngram, count in order.items()
            }
            for order in orders
        ]

    total = 0.0
    for tokens, sample_tokens, sample in zip(candidate_tokens, reference_tokens, samples, strict=True):
        candidate = vectors(_ngrams(tokens))
        similarities = [
            similarity(mine, theirs, len(tokens) - len(their_tokens))
            for their_tokens, orders in zip(sample_tokens, sample, strict=True)
            for mine, theirs in zip(candidate, vectors(orders), strict=True)
        ]
        total += sum(similarities) / len(similarities)
    return total / len(samples)


def _cosine(candidate: Vector, reference: Vector, length_difference: int) -> float:
    product = sum(value * reference.get(ngram, 0.0) for ngram, value in candidate.items())
    norm = math.hypot(*candidate.values()) * math.hypot(*reference.values())
    return product / norm if norm else 0.0


def _penalised_cosine(candidate: Vector, reference: Vector, length_difference: int) -> float:
    shared = ((value, reference[ngram]) for ngram, value in candidate.items() if ngram in reference)
    product = sum(min(mine, theirs) * theirs for mine, theirs in shared)
    norm = math.hypot(*candidate.values()) * math.hypot(*reference.values())
    penalty = math.exp(-(length_difference**2) / (2 * LENGTH_DEVIATION**2))
    return penalty * product / norm if norm else 0.0


def main(arguments=None) -> int:
    # Not above: a metric costs only its own dependencies.
    from opt_jax.data.sources import SPLITS, open_split
    from opt_jax.data.triplet import SourceError, UnusableSampleError

    parser = argparse.ArgumentParser(
        "opt_jax.evaluation.cider", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="as in --config.data.source, see opt_jax/data/sources.py")
    parser.add_argument("--split", default="train", choices=SPLITS)
    parser.add_argument("--out", required=True, type=Path, help="the JSON file to write")
    flags = parser.parse_args(arguments)
    documents = []
    try:
        source = open_split(flags.source, flags.split)
        for row in range(len(source)):
            with contextlib.suppress(UnusableSampleError):
                texts = source.read(row, image=False, audio=False).references
                documents.append([text for text in texts if tokenize(text)])
        documents = list(filter(None, documents))
        if not documents:
            raise SourceError(f"the {flags.split} split of {flags.source} has no texts; name another")
        found = document_frequencies(documents)
        flags.out.write_text(json.dumps(found))
    except (SourceError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{flags.out}: {len(found['frequencies'])} n-grams of {len(documents)} documents")
    return 0


if __name__ == "__main__":
    sys.exit(main())
