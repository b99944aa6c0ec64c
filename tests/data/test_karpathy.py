"""Karpathy's splits, in small, as dataset_flickr30k.json and dataset_coco.json are published."""

import json
import pickle

import numpy as np
import pytest
from raw_files import file_of, picture

from opt_jax.data.karpathy import Karpathy
from opt_jax.data.sources import open_splits
from opt_jax.data.triplet import Source, SourceError, UnusableSampleError


def entry(number: int, split, *sentences, **others):
    """As published: tokens, raw, imgid and sentid of each sentence, and sentids again beside them."""
    sentences = [
        {"tokens": text.lower().strip(" .").split(), "raw": text, "imgid": number, "sentid": place}
        for place, text in enumerate(sentences, 5 * (number or 0))
    ]
    fields = {"imgid": number, "sentences": sentences, "split": split, "filename": f"{number}.jpg"}
    return {"sentids": [sentence["sentid"] for sentence in sentences]} | fields | others


COCO = [
    entry(0, "test", "A ball.", "A red ball.\n", filepath="val2014", cocoid=391895),
    entry(1, "restval", "A dog.", filepath="val2014", cocoid=60623),
    entry(2, "train", "A cat.", "A black cat.", filepath="train2014", cocoid=483108),
    entry(3, "val", "A car.", filepath="val2014", cocoid=384029),
    entry(4, "test", "A tree.", filepath="val2014", cocoid=30),
]


def put(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(file_of(picture(seed=seed)))


def write(folder, *images, name="dataset_coco.json"):
    (folder / name).write_text(json.dumps({"images": images, "dataset": "coco"}))
    return folder / name


def refused(source, index: int, reason: str):
    with pytest.raises(UnusableSampleError, match=reason):
        source[index]


def test_sentences_are_rows_where_they_are_trained_on(tmp_path):
    spec = f"karpathy:{write(tmp_path, *COCO)},rows=training_sentences"
    splits = open_splits(spec)
    assert {split: len(source) for split, source in splits.items()} == {
        "train": 3,
        "validation": 1,
        "test": 2,
    }
    assert [splits["train"][row].id for row in (0, 1, 2)] == ["1/0", "2/0", "2/1"]
    assert splits["test"][0].references == ("A ball.", "A red ball.")


def test_a_row_a_picture(tmp_path):
    path = write(tmp_path, *COCO)
    for number, folder in enumerate(["val2014", "val2014", "train2014", "val2014", "val2014"]):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"{number}.jpg").write_bytes(file_of(picture(seed=number), "JPEG"))
    splits = open_splits(f"karpathy:{path},images={tmp_path},split={{split}}")
    assert {split: len(source) for split, source in splits.items()} == {
        "train": 2,
        "validation": 1,
        "test": 2,
    }
    test = splits["test"]
    assert isinstance(test, Source) and test.modalities == {"text", "image"} and test.name == "karpathy"
    assert [(row.id, row.caption, row.references) for row in test] == [
        ("0", "A ball.", ("A ball.", "A red ball.")),
        ("4", "A tree.", ("A tree.",)),
    ]
    assert [row.id for row in splits["train"]] == ["1", "2"]  # restval counts as train
    assert [row.id for row in Karpathy(path, "train", restval="apart")] == ["2"]
    assert [row.id for row in Karpathy(path, "restval")] == ["1"]
    from_val, from_train = (row.image.astype(int) for row in splits["train"])
    assert abs(from_val - from_train).max() > 50  # two pictures, of two folders
    assert len(pickle.loads(pickle.dumps(test))) == 2
    with pytest.raises(IndexError):
        test[2]


def test_a_row_a_sentence(tmp_path):
    path = write(tmp_path, *COCO)
    source = Karpathy(path, "test", rows="sentences")
    assert [(row.id, row.caption, row.references) for row in source] == [
        ("0/0", "A ball.", ("A ball.", "A red ball.")),
        ("0/1", "A red ball.", ("A red ball.", "A ball.")),
        ("4/0", "A tree.", ("A tree.",)),
    ]
    assert source.modalities == {"text"} and source[0].image is None
    assert source.groups[0] == source.groups[1] != source.groups[2]
    fingerprints = [
        json.dumps(Karpathy(path, split, **options).fingerprint())
        for split, options in [("test", {}), ("test", {"rows": "sentences"}), ("train", {}), ("val", {})]
    ]
    assert len(set(fingerprints)) == 4


def test_flickr30k_has_no_filepath(tmp_path):
    path = write(tmp_path, entry(7, "val", "A man."), entry(8, "val", "A woman."))
    put(tmp_path / "flickr30k-images" / "7.png")
    document = json.loads(path.read_text())
    document["images"][0]["filename"] = "7.png"
    path.write_text(json.dumps(document))
    source = Karpathy(path, "validation", images=tmp_path)
    np.testing.assert_array_equal(source[0].image, np.asarray(picture()))
    refused(source, 1, "'8': image '8.jpg' cannot be read in")


def test_bad_rows_cost_themselves(tmp_path):
    bad = {
        "'10': image '../x/10.jpg' leaves the folder": entry(10, "test", "Out.", filepath="../x"),
        r"'11': image is \['val2014', 5\], expected text": entry(11, "test", "A.", filepath="val2014")
        | {"filename": 5},
        "'12': image of the row is not named": entry(12, "test", "A.", filename=None),
        "'13': caption is empty": entry(13, "test"),
        "'14': caption is empty": entry(14, "test", "A.", sentences={"raw": "A."}),
        "row 6': id is None, expected text": entry(None, "test", "A."),
        "'0': id occurs in an earlier row": entry(0, "test", "Again."),
        "'17': row has the split 'tset', expected train, val, test, restval": entry(17, "tset", "A."),
        r"'18': row has the split \['test'\]": entry(18, ["test"], "A."),
        "row 10': id is None": 7,
    }
    path = write(tmp_path, entry(0, "test", "", "A ball.", filename="0.png"), *bad.values())
    put(tmp_path / "0.png")
    source = Karpathy(path, "test", images=tmp_path)
    assert len(source) == 11
    assert source[0].references == ("A ball.",) and source[0].image is not None
    for index, reason in enumerate(bad, 1):
        refused(source, index, reason)
    sentences = Karpathy(path, "test", rows="sentences")
    refused(sentences, 0, "'0/0': caption is empty")
    assert sentences[1].caption == "A ball." and sentences[1].id == "0/1"
    written = entry(20, "test", "A.", "B.")
    written["sentences"] = [{"raw": 5}, "B.", {"raw": "\ud800"}, {"raw": "C."}]
    source = Karpathy(write(tmp_path, written, name="b.json"), "test", rows="sentences")
    refused(source, 0, "'20/0': caption is 5, expected text")
    refused(source, 1, "'20/1': caption is empty")
    refused(source, 2, "'20/2': caption is no valid Unicode")
    assert source[3].caption == "C." and source[3].references == ("C.",)


@pytest.mark.parametrize(
    "content, reason",
    [
        ("{", "is no valid JSON"),
        ("[]", "has no list 'images'; expected one as in dataset_coco.json"),
        ('{"images": {}}', "has no list 'images'"),
        ('{"images": []}', "has no pictures of val: none at all"),
        (
            '{"images": [{"split": "train"}, {"split": "test"}, {"split": "test"}]}',
            "has no pictures of val: 1 of train, 2 of test",
        ),
        (None, "cannot be read: No such file"),
    ],
)
def test_documents_that_are_refused(tmp_path, content, reason):
    if content is not None:
        (tmp_path / "list.json").write_text(content)
    with pytest.raises(SourceError, match=f"list.json {reason}"):
        Karpathy(tmp_path / "list.json", "val")


@pytest.mark.parametrize(
    "options, reason",
    [
        (",split=dev", "split=dev; choose from train, val, test, restval"),
        (",split=val,rows=captions", "rows=captions; choose from images, sentences"),
        (",split=val,restval=val", "restval=val; choose from train, apart"),
        (",split=val,images=/nowhere", "/nowhere is no folder"),
    ],
)
def test_options_that_are_refused(tmp_path, options, reason):
    with pytest.raises(SourceError, match=reason):
        open_splits(f"karpathy:{write(tmp_path, *COCO)}{options}")


def test_the_document_has_the_splits_itself(tmp_path):
    path = write(tmp_path, *COCO)
    named = open_splits(f"karpathy:{path},split={{split}}")
    for split, source in open_splits(f"karpathy:{path}").items():
        assert source.fingerprint() == named[split].fingerprint() and len(source)
