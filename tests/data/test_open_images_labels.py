"""Open Images' lists of labels, in small, with lines as published and others."""

import pickle
import tracemalloc

import numpy as np
import pytest
from raw_files import file_of, picture

from opt_jax.data import open_images_labels
from opt_jax.data.open_images_labels import OpenImagesLabels
from opt_jax.data.sources import open_split
from opt_jax.data.triplet import Source, SourceError, UnusableSampleError

HEADER = "ImageID,Source,LabelName,Confidence"
FIRST, SECOND, THIRD = "000026e7ee790996", "000062a39995e348", "ffffffffffffffff"
DESCRIPTIONS = """/m/07j7r,Tree
/m/01bqvp,Sky
/m/03hgsf0,"Lemon, lime and bitters"
/m/02wvth,"Fiat 500 ""topolino\"\""
/g/11bc,Tree
"""


def write(folder, *lines: str, descriptions=DESCRIPTIONS, header=HEADER) -> dict:
    (folder / "labels.csv").write_text("\n".join([header, *lines]) + "\n")
    (folder / "classes.csv").write_text(descriptions)
    return {"path": folder / "labels.csv", "images": folder, "descriptions": folder / "classes.csv"}


def labels(source) -> dict[str, list[str]]:
    rows = [source.read(index, image=False) for index in range(len(source))]
    return {row.id: [source.class_names[label] for label in row.labels] for row in rows}


LINES = [
    f"{SECOND},verification,/m/03hgsf0,1",
    f"{FIRST},verification,/m/07j7r,1",
    f"{FIRST},crowdsource-verification,/m/01bqvp,1.0",
    f"{FIRST},verification,/m/02wvth,0",
    f"{FIRST},crowdsource-verification,/g/11bc,1",
    f"{THIRD},verification,/m/07j7r,0",
    f"{SECOND},machine,/m/02wvth,0.7",
]


def test_labels_of_pictures(tmp_path):
    (tmp_path / "validation").mkdir()
    (tmp_path / "validation" / f"{FIRST}.jpg").write_bytes(file_of(picture(), "JPEG"))
    given = write(tmp_path, *LINES)
    source = OpenImagesLabels(**given)
    assert isinstance(source, Source) and source.modalities == {"image"}
    assert labels(source) == {FIRST: ["Sky", "Tree"], SECOND: ["Lemon, lime and bitters"], THIRD: []}
    assert source.class_names == ["Lemon, lime and bitters", "Sky", "Tree"]
    assert source[0].image.shape == (10, 12, 3) and source[0].caption is None
    with pytest.raises(UnusableSampleError, match=f"{SECOND}': image '{SECOND}.jpg' cannot be read"):
        source[1]
    with pytest.raises(IndexError):
        source[3]
    assert labels(pickle.loads(pickle.dumps(source))) == labels(source)
    spec = f"{given['path']},images={tmp_path},descriptions={given['descriptions']}"
    likely = open_split(f"open_images_labels:{spec},confidence=0.7,hold_out=0", "train").source
    assert labels(likely)[SECOND] == ['Fiat 500 "topolino"', "Lemon, lime and bitters"]
    assert likely.fingerprint() != source.fingerprint()
    known = OpenImagesLabels(**given, class_names=["Sky", "Sea"])
    assert labels(known) == {FIRST: ["Sky"], SECOND: [], THIRD: []}


def test_descriptions_with_a_header_and_lists_of_boxes(tmp_path):
    """V7's descriptions have a header; lists of boxes name the same columns among others."""
    descriptions = "LabelName,DisplayName\r\n" + DESCRIPTIONS
    lines = [f"{FIRST},xclick,/m/07j7r,1,0.1,0.9,0.2,0.8", f"{FIRST},xclick,/m/07j7r,1,0,0.1,0.2,0.8"]
    given = write(tmp_path, *lines, descriptions=descriptions, header=f"{HEADER},XMin,XMax,YMin,YMax")
    assert labels(OpenImagesLabels(**given)) == {FIRST: ["Tree"]}


def test_labels_without_a_name_are_told(tmp_path):
    given = write(tmp_path, *LINES, f"{THIRD},verification,/m/0zzz,1", f"{THIRD},verification,/m/0yyy,0")
    with pytest.warns(UserWarning, match="descriptions lack them: 1 of 5 labels, such as '/m/0zzz'"):
        assert labels(OpenImagesLabels(**given))[THIRD] == []
    given = write(tmp_path, f"{THIRD},verification,/m/0zzz,1")
    with pytest.raises(SourceError, match="name none of its classes: 1 of 1 labels, such as '/m/0zzz'"):
        OpenImagesLabels(**given)


def test_bad_lines_cost_themselves(tmp_path, monkeypatch):
    bad = {
        "line 9': row has 3 cells, expected 4: ImageID,Source,LabelName,Confidence": f"{FIRST},/m/07j7r,1",
        "line 10': row has the ImageID '../../passwd', expected 16 of 0-9": "../../passwd,a,/m/07j7r,1",
        "line 11': row has the ImageID '000026E7EE790996'": f"{FIRST.upper()},a,/m/07j7r,1",
        "line 12': row has the ImageID '0x0026e7ee790996'": "0x0026e7ee790996,a,/m/07j7r,1",
        "line 13': row has the Confidence 'yes', expected 0 to 1": f"{FIRST},a,/m/07j7r,yes",
        "line 14': row has the Confidence 'nan'": f"{FIRST},a,/m/07j7r,nan",
        "line 15': row has the Confidence '2'": f"{FIRST},a,/m/07j7r,2",
    }
    given = write(tmp_path, *LINES, *bad.values(), "", "x" * 100_000)
    source = OpenImagesLabels(**given)
    assert len(source) == 3 + len(bad) + 2  # a line too long comes in two pieces
    assert source.read(0, image=False).id == FIRST
    for index, reason in enumerate(bad, 3):
        with pytest.raises(UnusableSampleError, match=f"'labels.csv, {reason}"):
            source[index]
    monkeypatch.setattr(open_images_labels, "MAX_BAD", 5)
    with pytest.raises(SourceError, match="6 lines cannot be read, the first of them, line 9, has 3 cells"):
        OpenImagesLabels(**given)


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({"header": "ImageID,LabelName"}, r"names no column Confidence: \['ImageID', 'LabelName'\]"),
        ({"header": LINES[0]}, "names no column ImageID"),
        ({"lines": []}, "labels.csv names no pictures"),
        ({"descriptions": "/m/07j7r,Tree\n/m/01bqvp\n"}, r"classes.csv, row 1 is \['/m/01bqvp'\], expected"),
        ({"descriptions": "/m/07j7r,Tree\n/m/07j7r,Sky\n"}, "row 1: /m/07j7r has another name"),
        ({"descriptions": '/m/07j7r,"Tree\n'}, "a quote is never closed"),
        ({"descriptions": '/m/07j7r,"Tree" x\n'}, "classes.csv, row 0 is no valid CSV"),
        ({"confidence": "0"}, "confidence=0; expected a number above 0 and at most 1"),
        ({"confidence": "much"}, "confidence=much; expected"),
        ({"confidence": "nan"}, "confidence=nan; expected"),
        ({"path": "gone.csv"}, "gone.csv cannot be read: No such file"),
        ({"images": "/nowhere"}, "/nowhere is no folder"),
    ],
)
def test_files_and_options_that_are_refused(tmp_path, changed, reason):
    lines = changed.pop("lines", LINES)
    made = {name: changed.pop(name) for name in ("header", "descriptions") if name in changed}
    with pytest.raises(SourceError, match=reason):
        OpenImagesLabels(**write(tmp_path, *lines, **made) | changed)


def test_memory_stays_small(tmp_path):
    """50 bytes a line, in whatever order: 10 million take half a gigabyte for a moment."""
    count = 40_000
    numbers = np.random.default_rng(0).permutation(count) // 4
    lines = [f"{number:016x},verification,/m/07j7r,1" for number in numbers]
    given = write(tmp_path, *lines)
    source = OpenImagesLabels.__new__(OpenImagesLabels)
    source.path = given["path"]
    tracemalloc.start()
    source._read(
        (f"{line}\n".encode() for line in lines),
        HEADER.encode(),
        {b"/m/07j7r": 0},
        1.0,
    )
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(source) == count / 4 and peak < 55 * count + 100_000 and kept < 10 * count + 100_000
