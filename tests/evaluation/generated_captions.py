"""Made-up captions with repeated words and shared stretches, for comparing metrics with references."""

import numpy as np

WORDS = "a a a the the red blue dog cat on near sits".split()


def corpora(number: int, seed: int, longest: int = 9):
    """`number` times (candidates, references): 1 to 4 samples of 1 to 3 references; a few empty."""
    rng = np.random.default_rng(seed)

    def text(shortest=1):
        return [str(word) for word in rng.choice(WORDS, size=rng.integers(shortest, longest + 1))]

    for _ in range(number):
        references = [[text() for _ in range(rng.integers(1, 4))] for _ in range(rng.integers(1, 5))]
        candidates = []
        for sample in references:
            candidate = list(sample[rng.integers(len(sample))])
            for _ in range(rng.integers(0, 4)):  # exchange stretches, put other words in
                i = rng.integers(len(candidate) + 1)
                candidate = candidate[i:] + text()[:2] + candidate[:i]
            candidates.append([] if rng.random() < 0.05 else candidate[:longest])
        yield (
            [" ".join(candidate) for candidate in candidates],
            [[" ".join(reference) for reference in sample] for sample in references],
        )
