"""Conceptual Captions, COCO captions and Visual Genome, in small, as they are published."""

import json
import pickle
import zlib

import numpy as np
import pytest
from raw_files import file_of, picture

from opt_jax.data.decoding import decode_image
from opt_jax.data.pairs import CocoCaptions, ConceptualCaptions, VisualGenome
from opt_jax.data.sources import held_out
from opt_jax.data.triplet import Source, SourceError, UnusableSampleError

URLS = [f"http://example.org/{name}.jpg?x=1" for name in "abcd"]


def put(path, seed=0, kind="JPEG"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(file_of(picture(seed=seed), kind))


def conceptual(folder, *lines, **options) -> ConceptualCaptions:
    (folder / "list.tsv").write_bytes(b"".join(line.encode() + b"\n" for line in lines))
    return ConceptualCaptions(folder / "list.tsv", **options)


def test_conceptual_captions_as_img2dataset_names_files(tmp_path):
    put(tmp_path / "00000" / "000000000.jpg")
    put(tmp_path / "00000" / "000000001.jpg", seed=1)
    (tmp_path / "00000" / "000000001.json").write_text(json.dumps({"url": URLS[1]}))
    put(tmp_path / "00000" / "000000002.jpg", seed=2)
    (tmp_path / "00000" / "000000002.json").write_text(json.dumps({"url": URLS[3]}))
    lines = [
        "caption\turl",
        f'a "ball\t{URLS[0]}',
        f"{URLS[1]}\ta dog",
        f"a cat\t{URLS[2]}",
        "no url",
        "\t" + URLS[3],
    ]
    source = conceptual(tmp_path, *lines, images=tmp_path)
    assert isinstance(source, Source) and len(source) == 5 and source.modalities == {"text", "image"}
    assert [source[index].caption for index in (0, 1)] == ['a "ball', "a dog"]
    assert source[1].id == "000000001" and source[1].audio is None
    expected = decode_image(file_of(picture(seed=1), "JPEG"), "")
    np.testing.assert_array_equal(source[1].image, expected)
    for index, reason in [
        (2, "'000000002': image '00000/000000002.jpg' comes from another url than the row's"),
        (3, "'list.tsv, row 3': row has 1 cells, expected 2"),
        (4, "'000000004': caption is empty"),
    ]:
        with pytest.raises(UnusableSampleError, match=reason):
            source[index]
    assert len(pickle.loads(pickle.dumps(source))) == 5
    with pytest.raises(IndexError):
        source[5]


def test_other_names_of_conceptual_captions(tmp_path):
    put(tmp_path / "training" / str(zlib.crc32(URLS[0].encode())))
    put(tmp_path / "1.jpg", seed=1)
    put(tmp_path / "mine.png", seed=2, kind="PNG")
    lines = [f"a ball\t{URLS[0]}\t../a.jpg", f"a dog\t{URLS[1]}\tmine.png"]
    assert conceptual(tmp_path, *lines, images=tmp_path, names="crc32")[0].image.shape == (10, 12, 3)
    assert conceptual(tmp_path, *lines, images=tmp_path, names="row")[1].image.shape == (10, 12, 3)
    column = conceptual(tmp_path, *lines, images=tmp_path, names="column")
    np.testing.assert_array_equal(column[1].image, np.asarray(picture(seed=2)))
    with pytest.raises(UnusableSampleError, match="leaves the folder"):
        column[0]
    with pytest.raises(UnusableSampleError, match="000000000.jpg' cannot be read in"):
        conceptual(tmp_path, *lines, images=tmp_path)[0]
    text = conceptual(tmp_path, *lines)
    assert text[0].image is None and text.modalities == {"text"}
    assert text.fingerprint() != column.fingerprint()
    with pytest.raises(SourceError, match="names=md5; choose from img2dataset, crc32, row, column"):
        conceptual(tmp_path, *lines, names="md5")
    with pytest.raises(SourceError, match="nowhere is no folder"):
        conceptual(tmp_path, *lines, images=tmp_path / "nowhere")


COCO = {
    "info": {},
    "images": [
        {"id": 9, "file_name": "000000000009.jpg", "height": 480},
        {"id": 25, "file_name": "000000000025.jpg"},
        {"id": 30},
        7,
    ],
    "annotations": [
        {"image_id": 9, "id": 101, "caption": "A ball.\n"},
        {"image_id": 25, "id": 102, "caption": "A dog."},
        {"image_id": 9, "id": 103, "caption": "A red ball."},
        {"image_id": 9, "id": 104, "caption": ""},
        {"image_id": 9, "id": 105},
        {"image_id": 31, "id": 106, "caption": "Of no picture."},
        {"image_id": 30, "id": 107, "caption": "Of a picture without a name."},
        {"image_id": [9], "id": 108, "caption": 3},
        {"image_id": 9, "id": 101, "caption": "Again."},
        None,
    ],
}


def test_coco_captions(tmp_path):
    (tmp_path / "captions.json").write_text(json.dumps(COCO))
    put(tmp_path / "images" / "val2017" / "000000000009.jpg")
    put(tmp_path / "images" / "000000000025.jpg")
    source = CocoCaptions(tmp_path / "captions.json", images=tmp_path / "images")
    assert isinstance(source, Source) and len(source) == 10
    assert [(source[i].id, source[i].caption) for i in (0, 1, 2)] == [
        ("101", "A ball."),
        ("102", "A dog."),
        ("103", "A red ball."),
    ]
    assert source[2].references == ("A red ball.", "A ball.", "Again.")
    assert source[0].image.shape == source[1].image.shape == (10, 12, 3)
    for index, reason in [
        (3, "'104': caption is empty"),
        (4, "'105': caption is empty"),
        (5, "'106': image of the row is not named in captions.json"),
        (6, "'107': image of the row is not named"),
        (7, "'108': caption is 3, expected text"),
        (8, "'101': id occurs in an earlier row"),
        (9, "'captions.json, row 9': id is None"),
    ]:
        with pytest.raises(UnusableSampleError, match=reason):
            source[index]
    assert source.groups[0] == source.groups[2] != source.groups[1]
    text = pickle.loads(pickle.dumps(CocoCaptions(tmp_path / "captions.json")))
    assert text[0].caption == "A ball." and text[0].image is None and text[5].caption == "Of no picture."
    with pytest.raises(IndexError):
        text[10]


def test_all_captions_of_a_picture_are_held_out_together(tmp_path):
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(40)]
    annotations = [{"id": i, "image_id": i % 40, "caption": f"Number {i}."} for i in range(200)]
    (tmp_path / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    parts = {
        split: held_out(CocoCaptions(tmp_path / "captions.json"), split, 18) for split in ("train", "test")
    }
    pictures = {split: {int(triplet.id) % 40 for triplet in part} for split, part in parts.items()}
    assert len(parts["test"]) == 20 and len(parts["train"]) == 160
    assert len(pictures["test"]) == 4 and not pictures["test"] & pictures["train"]


GENOME = [
    {
        "id": 1,
        "regions": [
            {"region_id": 1382, "image_id": 1, "phrase": "the clock is green", "x": 421, "y": 57},
            {"region_id": 1383, "image_id": 1, "phrase": " shade along the street "},
            {"region_id": 1382, "image_id": 1, "phrase": "the id of another"},
            {"region_id": 1384, "phrase": 5},
            {"region_id": 1385},
        ],
    },
    {"id": 2, "regions": [{"region_id": 20, "image_id": 2, "phrase": "a car"}]},
    {"id": "../3", "regions": [{"region_id": 30, "phrase": "a path"}]},
    {"id": 4, "regions": None},
]


def test_visual_genome(tmp_path):
    (tmp_path / "region_descriptions.json").write_text(json.dumps(GENOME))
    put(tmp_path / "VG_100K" / "1.jpg")
    put(tmp_path / "VG_100K_2" / "2.jpg", seed=1)
    source = VisualGenome(tmp_path / "region_descriptions.json", images=tmp_path)
    assert isinstance(source, Source) and len(source) == 8
    assert [(source[i].id, source[i].caption) for i in (0, 1, 5)] == [
        ("1/1382", "the clock is green"),
        ("1/1383", "shade along the street"),
        ("2/20", "a car"),
    ]
    assert source[5].image.shape == (10, 12, 3) and source.groups[0] == source.groups[1] != source.groups[5]
    for index, reason in [
        (2, "'1/1382': id occurs in an earlier row"),
        (3, "'1/1384': caption is 5, expected text"),
        (4, "'1/1385': caption is empty"),
        (6, "'../3/30': image of the row is not named"),
        (7, "'4/None': caption is empty"),
    ]:
        with pytest.raises(UnusableSampleError, match=reason):
            source[index]
    assert VisualGenome(tmp_path / "region_descriptions.json")[5].image is None


@pytest.mark.parametrize("kind", [CocoCaptions, VisualGenome])
@pytest.mark.parametrize(
    "text, reason",
    [
        ("{", "is no valid JSON"),
        ("3", "has no list 'images'|holds int, expected a list"),
        ("{}", "has no list 'images'|holds dict, expected a list"),
        ("[" * 100_000, "is no valid JSON"),
        (b"\xff", "is no valid JSON"),
        (None, "cannot be read"),
    ],
)
def test_documents_that_are_refused(tmp_path, kind, text, reason):
    if text is not None:
        (tmp_path / "list.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SourceError, match=f"list.json ({reason})"):
        kind(tmp_path / "list.json")
