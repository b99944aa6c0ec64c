"""METEOR, its exact-match stage only: unigram F-mean with a penalty for broken word order.

Formula and parameters of Banerjee and Lavie 2005 (ACL Anthology W05-0909), in the notation of Lavie and
Agarwal 2007 (W07-0734). There are no stages for stems, synonyms and paraphrases, and not the tuned parameters
and function words of METEOR 1.5, which caption servers run: values are for comparison with one another, not
with published ones.

Of several alignments with the most matches the one of fewest chunks counts (Denkowski and Lavie 2011,
W11-2107); 2005 asks for the fewest crossings, which can leave the number of chunks open. METEOR 1.5 gives the
same values for `-m exact -w 1.0 -p "0.9 3.0 0.5 0.5"`, but where its narrower search misses an alignment of
fewer chunks, and for a corpus equal to its references, which it gives 1.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from opt_jax.evaluation.caption_tokens import tokenize_pairs

ALPHA = 0.9  # share of recall: F-mean = P R / (alpha P + (1 - alpha) R), that is 10 P R / (R + 9 P)
BETA = 3.0  # exponent of the fragmentation chunks / matches
GAMMA = 0.5  # the largest penalty
BEAM_SIZE = 512  # partial alignments followed; the search is exact until there are more


class Alignment(NamedTuple):
    """Counts of a candidate against a reference: matched words, runs of them in the same order, lengths."""

    matches: int = 0
    chunks: int = 0
    candidate_length: int = 0
    reference_length: int = 0

    def score(self) -> float:
        """F-mean (1 - gamma (chunks / matches) ** beta) in [0, 1); equal texts of m words: 1 - 0.5 / m**3."""
        if self.matches == 0:
            return 0.0
        precision = self.matches / self.candidate_length
        recall = self.matches / self.reference_length
        f_mean = precision * recall / (ALPHA * precision + (1 - ALPHA) * recall)
        return f_mean * (1 - GAMMA * (self.chunks / self.matches) ** BETA)


def meteor(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus METEOR x 100, exact matches only.

    candidates: n texts; references: for each, one or more texts, of which the one with the highest score
    counts, on a tie the first of them. Matches, chunks and lengths are summed over the corpus and
    enter the formula once, as in the published scorer; an empty candidate adds its first reference's length.
    Bad input is a ValueError, see `caption_tokens.tokenize_pairs`.
    """
    best = [
        # Rounded, so that scores equal but for the last bit are a tie.
        max((align(tokens, text) for text in sample), key=lambda a: round(a.score(), 12))
        for tokens, sample in zip(*tokenize_pairs(candidates, references), strict=True)
    ]
    return 100.0 * Alignment(*map(sum, zip(*best, strict=True))).score()


def align(candidate: Sequence[str], reference: Sequence[str]) -> Alignment:
    """The alignment of equal words, each used once, with the most matches and then the fewest chunks.

    A chunk is a longest run of matched words that are neighbours in the same order on both sides. Found by a
    beam search over the candidate's words; where more than `BEAM_SIZE` ways are open (a word repeated often
    on both sides), an alignment of fewer chunks may be missed.
    """
    places: dict[str, list[int]] = {}
    for place, word in enumerate(reference):
        places.setdefault(word, []).append(place)
    counts = Counter(candidate)
    matches = {word: min(count, len(places.get(word, ()))) for word, count in counts.items()}
    to_skip = {word: counts[word] - matches[word] for word in counts}
    # (places taken, as bits; place of the word before, None if that was skipped) -> chunks. How often a word
    # was skipped follows from the places taken, as all ways have read the same words.
    ways: dict[tuple[int, int | None], int] = {(0, None): 0}
    for position, word in enumerate(candidate):
        seen = candidate[:position].count(word)
        extended: dict[tuple[int, int | None], int] = {}
        for (taken, before), chunks in ways.items():
            free = [place for place in places.get(word, ()) if not taken >> place & 1]
            steps = [((taken | 1 << place, place), chunks + (before != place - 1)) for place in free]
            skipped = seen - (len(places.get(word, ())) - len(free))
            if skipped < to_skip[word]:
                steps.append(((taken, None), chunks))
            for way, total in steps:
                extended[way] = min(total, extended.get(way, total))
        ways = dict(sorted(extended.items(), key=lambda item: item[1])[:BEAM_SIZE])
    return Alignment(sum(matches.values()), min(ways.values()), len(candidate), len(reference))
