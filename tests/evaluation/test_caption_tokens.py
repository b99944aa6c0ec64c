from pathlib import Path

import pytest

from opt_jax.evaluation.caption_tokens import tokenize, tokenize_pairs

# Made-up captions, and what Stanford's PTBTokenizer (CoreNLP 3.4.1, as in pycocoevalcap 1.2) makes of them,
# less the punctuation that the caption server drops.
PUBLISHED = [
    line.split("\t") for line in Path(__file__).with_name("stanford_tokens.tsv").read_text().splitlines()
]


def test_words_are_those_of_the_published_tokenizer():
    assert len(PUBLISHED) == 200
    assert {caption: " ".join(tokenize(caption)) for caption, _ in PUBLISHED} == dict(PUBLISHED)


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A dog, isn't it? It's well-lit.", "a dog is n't it it 's well-lit"),
        ("I cannot; they're gonna.", "i can not they 're gon na"),
        ("the girls' o'clock “café”…", "the girls o'clock café"),
        ("50% of $1,000.50 (at 10:30) & #tags", "50 % of $ 1,000.50 -lrb- at 10:30 -rrb- & #tags"),
        ("Mr. Smith in the U.S. said no.", "mr. smith in the u.s. said no"),
        ("", ""),
        (" -- ... ' \"", ""),
    ],
)
def test_by_hand(caption, words):
    assert tokenize(caption) == words.split()


@pytest.mark.parametrize(
    ("candidates", "references", "message"),
    [
        ([], [], "no candidate"),
        (["a"], [["a"], ["b"]], "references for 2"),
        (["a", "b"], [["a"], []], "caption 1 has an empty reference"),
        (["a"], [["a", "..."]], "caption 0 has an empty reference"),
        (["a"], ["a"], "must be a list"),
    ],
)
def test_bad_input_is_named(candidates, references, message):
    with pytest.raises(ValueError, match=message):
        tokenize_pairs(candidates, references)
