import json
import math

import numpy as np
import pytest
from generated_captions import corpora

from opt_jax.evaluation.cider import cider, cider_d, document_frequencies, main, read_frequencies


def test_by_hand():
    # Two documents: a word of one weighs log 2, "a" is in both and weighs nothing. Words: (red, dog) = (1, 0)
    # against (1, 1), cosine 1 / sqrt 2. Pairs: "a red" against "a red", "red dog", 1 / sqrt 2 again. Nothing
    # longer. The second candidate shares nothing of weight.
    candidates, references = ["a red", "a dog"], [["a red dog"], ["a blue cat"]]
    cosine = (1 / math.sqrt(2)) * 2 / 4
    assert cider(candidates, references) == pytest.approx(100 * cosine / 2)
    penalty = math.exp(-1 / (2 * 6.0**2))
    assert cider_d(candidates, references) == pytest.approx(1000 * cosine * penalty / 2)


def test_cider_d_clips_repeated_words_and_cider_does_not():
    references = [["red dog"], ["blue cat"]]
    repeated, plain = cider_d(["red red", ""], references), cider_d(["red", ""], references)
    # min(2, 1) * 1 over 2 * sqrt 2, without penalty; the clip halves it. Unclipped both are 1 / sqrt 2.
    assert repeated == pytest.approx(1000 / (2 * math.sqrt(2)) / 4 / 2)
    assert plain == pytest.approx(1000 / math.sqrt(2) * math.exp(-1 / 72) / 4 / 2)
    assert cider(["red red", ""], references) == pytest.approx(cider(["red", ""], references))


def direct(candidates, references, documents, clipped):
    """The formula on dense vectors; documents: lists of texts that the n-grams are counted in."""

    def counts(text, known, n):
        words = text.split()
        here = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        return np.array([here.count(ngram) for ngram in known], np.float64)

    total = 0.0
    texts = [*candidates, *(text for group in (*references, *documents) for text in group)]
    for n in range(1, 5):
        known = sorted({tuple(t.split()[i : i + n]) for t in texts for i in range(len(t.split()) - n + 1)})
        if not known:
            continue
        having = sum((sum(counts(t, known, n) for t in group) > 0) for group in documents)
        weights = np.log(len(documents)) - np.log(np.maximum(having, 1))
        for candidate, sample in zip(candidates, references, strict=True):
            for reference in sample:
                mine, theirs = counts(candidate, known, n) * weights, counts(reference, known, n) * weights
                if mine.any() and theirs.any():
                    similarity = (np.minimum(mine, theirs) if clipped else mine) @ theirs
                    similarity /= np.linalg.norm(mine) * np.linalg.norm(theirs)
                    if clipped:
                        gap = len(candidate.split()) - len(reference.split())
                        similarity *= 10 * np.exp(-(gap**2) / 72)
                    total += similarity / 4 / len(sample) / len(candidates)
    return 100 * total


@pytest.mark.parametrize(("metric", "clipped"), [(cider, False), (cider_d, True)])
def test_agrees_with_its_formula(metric, clipped):
    above_zero = 0
    for candidates, references in corpora(200, seed=2):
        expected = direct(candidates, references, references, clipped)
        assert metric(candidates, references) == pytest.approx(expected, abs=1e-9)
        above_zero += expected > 0
    assert above_zero > 100


def test_frequencies_may_come_from_elsewhere(tmp_path):
    for (candidates, references), (_, others) in zip(corpora(20, seed=3), corpora(20, seed=4), strict=True):
        frequencies = document_frequencies(others)
        expected = direct(candidates, references, others, clipped=True)
        assert cider_d(candidates, references, frequencies) == pytest.approx(expected, abs=1e-9)
        path = tmp_path / "frequencies.json"
        path.write_text(json.dumps(frequencies))
        assert cider_d(candidates, references, path) == pytest.approx(expected, abs=1e-9)


def test_document_frequencies_by_hand():
    assert document_frequencies([["A red dog.", "a red cat"], ["a dog"]]) == {
        "documents": 2,
        "frequencies": dict.fromkeys(("a", "dog"), 2)
        | dict.fromkeys(("red", "cat", "a red", "red dog", "red cat", "a dog", "a red dog", "a red cat"), 1),
    }


def test_one_sample_needs_frequencies_from_elsewhere():
    assert cider_d(["a dog"], [["a dog"]]) == 0.0
    frequencies = document_frequencies([["a dog"], ["a cat"]])
    # Nothing has 3 or 4 words.
    assert cider_d(["a dog"], [["a dog"]], frequencies) == pytest.approx(1000 * 2 / 4)


def test_bad_input_is_named(tmp_path):
    with pytest.raises(ValueError, match="caption 1 has an empty reference"):
        cider(["a", "b"], [["a"], [""]])
    with pytest.raises(ValueError, match="caption 0 has an empty reference"):
        document_frequencies([["a", "."]])
    with pytest.raises(ValueError, match="in 3 of 2 documents"):
        cider_d(["a"], [["a"]], {"documents": 2, "frequencies": {"a": 3}})
    path = tmp_path / "other.json"
    path.write_text('{"a": 3}')
    with pytest.raises(ValueError, match="other.json: expected the keys"):
        cider_d(["a"], [["a"]], path)
    path.write_text('{"documents": 3, "frequencies": {"a": "3"}}')
    with pytest.raises(ValueError, match="other.json: .* and whole numbers"):
        read_frequencies(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="other.json: no document frequencies can be read"):
        read_frequencies(path)
    with pytest.raises(ValueError, match="gone.json: no document frequencies can be read"):
        read_frequencies(tmp_path / "gone.json")


def test_the_command_counts_a_source(tmp_path, capsys):
    texts = [["A red dog.", "..."], ["?"], ["a dog", "a cat"]]
    pictures = [
        {"imgid": i, "filename": f"{i}.jpg", "split": "train", "sentences": [{"raw": text} for text in said]}
        for i, said in enumerate(texts)
    ]
    path, out = tmp_path / "dataset_coco.json", tmp_path / "counted.json"
    path.write_text(json.dumps({"images": pictures}))
    assert main([f"karpathy:{path},images={tmp_path}", f"--out={out}"]) == 0
    assert read_frequencies(out) == document_frequencies([["A red dog."], ["a dog", "a cat"]])
    assert "of 2 documents" in capsys.readouterr().out
    assert main([f"karpathy:{path}x,images={tmp_path}", f"--out={out}"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
