"""Lists that people write: every bad row costs that row only."""

import csv
import json
import os
import pickle
import subprocess
import sys
import time

import numpy as np
import pytest
from raw_files import BAD_PICTURES, BAD_SOUNDS, PNG, file_of, picture, sound, tone

from opt_jax.configuration import differences
from opt_jax.data.files import read_file
from opt_jax.data.lines import MAX_ROW
from opt_jax.data.manifest import Manifest
from opt_jax.data.triplet import Source, SourceError, UnusableSampleError, usable

GOOD = {"id": "good", "image": "good.png", "audio": "good.wav", "caption": "A ball."}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "good.png").write_bytes(file_of(picture()))
    (tmp_path / "good.wav").write_bytes(sound(tone(), 16_000))
    return tmp_path


def manifest(folder, *rows, name="list.jsonl") -> Manifest:
    """Rows are dicts, or lines as they are."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (folder / name).write_bytes(b"\n".join(lines) + b"\n")
    return Manifest(folder / name)


def assert_only_this_is_bad(source, index, sample_id, part, reason):
    """Row `index` is refused for this reason, all others are read."""
    start = time.monotonic()
    with pytest.raises(UnusableSampleError, match=reason) as error:
        source[index]
    assert (error.value.sample_id, error.value.part) == (sample_id, part), str(error.value)
    assert time.monotonic() - start < 5
    assert usable(source, index) is None
    for other in set(range(len(source))) - {index}:
        assert source[other].image is not None and source[other].audio is not None


def test_a_whole_row_and_its_parts(folder):
    row = GOOD | {"labels": ["dog", "ball"], "references": ["A ball.", "Round."], "speaker": "ann", "more": 1}
    others = {"id": 7, "caption": "Nothing else.", "labels": ["cat"]}, {"id": "no"}
    source = manifest(folder, row, *others)
    assert isinstance(source, Source) and len(source) == 3
    assert source.class_names == ["ball", "cat", "dog"]
    assert source.modalities == {"text", "image", "audio"}
    assert manifest(folder, GOOD | {"audio": None}, {"caption": "of no id"}).modalities == {"text", "image"}
    source = manifest(folder, row, *others)
    triplet = source[0]
    np.testing.assert_array_equal(triplet.image, np.asarray(picture()))
    np.testing.assert_allclose(triplet.audio, tone(), atol=1e-4)
    assert (triplet.id, triplet.caption, triplet.speaker) == ("good", "A ball.", "ann")
    assert triplet.references == ("A ball.", "Round.") and triplet.labels == (0, 2)
    assert source.read(0, image=False).image is None and source.read(0, audio=False).audio is None
    other = source[1]
    assert (other.id, other.caption, other.references) == ("7", "Nothing else.", ("Nothing else.",))
    assert other.image is other.audio is None and other.labels == (1,)
    with pytest.raises(UnusableSampleError, match="sample 'no': row has neither image nor caption nor audio"):
        source[2]
    assert [source.caption(index) for index in range(3)] == ["A ball.", "Nothing else.", None]
    with pytest.raises(IndexError):
        source[3]


def test_classes_are_those_of_the_training_split(folder):
    manifest(folder, GOOD | {"labels": ["cat", "fox"]})
    source = Manifest(folder / "list.jsonl", class_names=["dog", "fox"])
    assert source.class_names == ["dog", "fox"] and source[0].labels == (1,)
    with pytest.warns(UserWarning, match="labels that the training split has not are left out: 'cat', 'fox'"):
        assert Manifest(folder / "list.jsonl", class_names=["dog"])[0].labels == ()


def test_fingerprint_and_pickle(folder):
    source = manifest(folder, GOOD)
    assert json.loads(json.dumps(source.fingerprint())) == source.fingerprint()
    source[0]  # has the file open
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy[0].image, source[0].image)
    assert copy.fingerprint() == source.fingerprint() != manifest(folder, GOOD | {"id": "b"}).fingerprint()
    before = manifest(folder, GOOD).fingerprint()
    (folder / "good.png").write_bytes((folder / "good.png").read_bytes() + b"\0")  # after the picture's end
    np.testing.assert_array_equal(manifest(folder, GOOD)[0].image, source[0].image)
    assert differences(before, manifest(folder, GOOD).fingerprint())[0].startswith("files_sha256: ")


@pytest.mark.parametrize(
    "part, name", [*(("image", n) for n in BAD_PICTURES), *(("audio", n) for n in BAD_SOUNDS)]
)
def test_a_bad_file_costs_its_row(folder, part, name):
    content, reason = (BAD_PICTURES | BAD_SOUNDS)[name]
    (folder / name).write_bytes(content)
    source = manifest(folder, GOOD, GOOD | {"id": "b", part: name}, GOOD | {"id": "c"})
    assert_only_this_is_bad(source, 1, "b", part, reason)


@pytest.mark.parametrize("part", ["image", "audio"])
@pytest.mark.parametrize(
    "name, reason",
    [
        ("missing.png", "'missing.png' cannot be read in .*: No such file"),
        ("../outside.png", "'../outside.png' leaves the folder of its list"),
        ("a/../../outside.png", "leaves the folder"),
        (r"..\outside.png", "leaves the folder"),
        ("/etc/passwd", "leaves the folder"),
        (r"C:\outside.png", "leaves the folder"),
        ("link.png", "'link.png' is a link that leaves"),
        ("away/outside.png", "is a link that leaves"),
        ("circle", "cannot be read in .*"),
        ("pipe", "is no file"),
        (".", "expected the name of a file"),
        ("", "expected the name of a file"),
        ("a\0b.png", "expected the name of a file"),
        ("\ud800.png", "is no valid Unicode"),
        ("x" * 300, "cannot be read in .*: File name too long"),
        (["good.png"], "expected text"),
        (3, "is 3, expected text"),
    ],
)
def test_names_of_files_that_are_refused(folder, part, name, reason):
    (folder / "inside").mkdir()
    for file in folder.iterdir():
        if file.is_file():
            file.rename(folder / "inside" / file.name)
    (folder / "outside.png").write_bytes(file_of(picture()))
    inside = folder / "inside"
    (inside / "link.png").symlink_to(folder / "outside.png")
    (inside / "away").symlink_to(folder)
    (inside / "circle").symlink_to(inside / "circle")
    os.mkfifo(inside / "pipe")
    source = manifest(inside, GOOD, GOOD | {"id": "b", part: name})
    assert_only_this_is_bad(source, 1, "b", part, reason)


def test_a_link_within_the_folder_is_followed(folder):
    (folder / "link.png").symlink_to(folder / "good.png")
    assert manifest(folder, GOOD | {"image": "link.png"})[0].image is not None


@pytest.mark.parametrize(
    "field, value, reason",
    [
        ("caption", "", "is empty"),
        ("caption", "x" * (1 << 20), "has 1048576 characters"),
        ("caption", "a\0b", "holds NUL"),
        ("caption", "\udc80", "is no valid Unicode"),
        ("caption", ["a"], r"is \['a'\], expected text"),
        ("labels", "dog", "is 'dog', expected a list of texts"),
        ("labels", [3], r"is \[3\], expected a list"),
        ("labels", {"dog": 1}, "expected a list"),
        ("labels", ["\udc80"], "is no valid Unicode"),
        ("references", [None], r"is \[None\], expected a list"),
        ("speaker", 3, "is 3, expected text"),
    ],
)
def test_fields_that_are_refused(folder, field, value, reason):
    source = manifest(folder, GOOD, GOOD | {"id": "b", field: value}, GOOD | {"id": "c"})
    assert_only_this_is_bad(source, 1, "b", field, reason)
    assert source.class_names == []


@pytest.mark.parametrize(
    "value, shown, reason",
    [
        ("good", "good", "occurs in an earlier row; ids must differ"),
        ("../b", "../b", "looks like a path"),
        (r"a\..\b", r"a\..\b", "looks like a path"),
        ("/b", "/b", "looks like a path"),
        ("", "", "is empty"),
        ("b\n", "b\n", "do not print"),
        ("\ud800", "\ud800", "do not print"),
        ("b" * 600, "b" * 40, "is over 512 characters"),
        (None, "list.jsonl, row 1", "is None, expected text"),
        (True, "list.jsonl, row 1", "is True, expected text"),
        ({"a": 1}, "list.jsonl, row 1", "expected text"),
    ],
)
def test_ids_that_are_refused(folder, value, shown, reason):
    source = manifest(folder, GOOD, GOOD | {"id": value}, GOOD | {"id": "c"})
    assert_only_this_is_bad(source, 1, shown, "id", reason)


@pytest.mark.parametrize(
    "line, reason",
    [
        (b'{"id": "b", ', "is no valid JSON"),
        (b'["b"]', "holds list, expected an object"),
        (b"null", "holds NoneType, expected an object"),
        (b"[" * 100_000 + b"]" * 100_000, "is no valid JSON"),
        (b'{"id": "b", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "is no valid JSON"),
        (b'{"id": "b\xff", "caption": "A ball."}', "is no valid UTF-8"),
        (b'{"id": 5, "caption": "\xff"}', "is no valid UTF-8"),
        (b'{"id": "b", "caption: \xff"}', "is no valid UTF-8"),
        (b'{"id": "b", "n": ' + b"9" * 100_000 + b"}", "is no valid JSON"),
        (b'{"id": "' + b"b" * (MAX_ROW + 5) + b'"}', "has 16 MiB, at most 16"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_lines_that_are_refused(folder, line, reason):
    source = manifest(folder, GOOD, line, GOOD | {"id": "c"})
    assert_only_this_is_bad(source, 1, "list.jsonl, row 1", "row", reason)


def test_a_caption_that_is_no_utf8_is_told_by_its_id(folder):
    bad = b'{"id": "b", "caption": "\xff\xfe"}'
    # A file may begin with the mark of its byte order.
    source = manifest(folder, b"\xef\xbb\xbf" + bad, GOOD, bad.replace(b'"b"', b'"c"'))
    for index, name in ((0, "b"), (2, "c")):
        with pytest.raises(UnusableSampleError, match=f"sample '{name}': row is no valid UTF-8"):
            source[index]
    for end, separator in (("csv", b","), ("tsv", b"\t")):
        lines = [b"caption, id", b"A ball.,a", b"\xff,b", b""]
        source = table(folder, b"\n".join(lines).replace(b",", separator), f"list.{end}")
        with pytest.raises(UnusableSampleError, match="sample 'b': row is no valid UTF-8"):
            source[1]


def test_empty_lines_and_other_line_ends(folder):
    lines = [b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), b"\r", b"", json.dumps(GOOD | {"id": "b"}).encode()]
    source = manifest(folder, *lines)
    assert [triplet.id for triplet in source] == ["good", "b"]
    assert len(manifest(folder, b"", b"")) == 0


def test_a_list_that_is_missing(tmp_path):
    with pytest.raises(SourceError, match="none.jsonl cannot be read: No such file"):
        Manifest(tmp_path / "none.jsonl")


def table(folder, text, name="list.csv") -> Manifest:
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return Manifest(folder / name)


def test_csv_with_quotes_and_line_breaks(folder):
    rows = [
        ["id", "caption", "image", "labels", "references"],
        ["a", 'A "red"\nball,\r\n\nround.', "good.png", "ball|red", "Round.|Red."],
        ["b", "", "good.png", "", ""],
        ["c", "5\u2028 nails\x0b", "", "", ""],
    ]
    with open(folder / "list.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    source = Manifest(folder / "list.csv")
    assert len(source) == 3 and source.class_names == ["ball", "red"]
    assert source[0].caption == rows[1][1]
    assert source[0].references == (rows[1][1], "Round.", "Red.") and source[0].labels == (0, 1)
    assert source[1].caption is None and source[1].image is not None
    assert source[2].caption == rows[3][1] and source[2].image is None


def test_a_quote_within_a_cell_does_not_open_it(folder):
    source = table(folder, 'id,caption\na,5" nails\nb,a "good" ball\nc,"x, ""y"""\nd,z"\n')
    assert [triplet.caption for triplet in source] == ['5" nails', 'a "good" ball', 'x, "y"', 'z"']


@pytest.mark.parametrize(
    "row, reason",
    [
        ("b,good.png", "has 2 cells, the header 3"),
        ("b,good.png,good.wav,more", "has 4 cells, the header 3"),
        ('b,"good.png"x,good.wav', "is no valid CSV"),
        ('b,good.png,"' + "x" * 200_000 + '"', "is no valid CSV: field larger than"),
        (b"b\xff,good.png,good.wav", "is no valid UTF-8"),
        (b"b,\xff", "is no valid UTF-8"),
    ],
)
def test_rows_of_csv_that_are_refused(folder, row, reason):
    row = row if isinstance(row, bytes) else row.encode()
    source = table(folder, b"id,image,audio\na,good.png,good.wav\n" + row + b"\nc,good.png,good.wav\n")
    assert len(source) == 3
    assert_only_this_is_bad(source, 1, "list.csv, row 1", "row", reason)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("name,image\na,good.png\n", r"its first row names no column `id`: \['name', 'image'\]"),
        ("", "names no column `id`"),
        ("id,image, image\na,good.png,b.png\n", "names the column 'image' more than once"),
        (b"id,\xff\n", "its first row cannot be read"),
        ('id,caption\na,b\nc,"d\ne,f\n', "row 1: a quote is never closed"),
    ],
)
def test_tables_that_are_refused(folder, text, reason):
    with pytest.raises(SourceError, match=f"list.csv.*{reason}"):
        table(folder, text)


def test_names_of_columns_may_have_spaces_around_and_unknown_ones_are_told(folder):
    with pytest.warns(UserWarning, match=r"list.csv: .*\n  'image_path'; did you mean 'image'\?$"):
        source = table(folder, "id, caption ,image_path\na,b,good.png\n")
    assert source[0].caption == "b" and source[0].image is None
    with pytest.warns(UserWarning, match="'txt'"):
        manifest(folder, {"id": "a", "caption": "b", "txt": "c"})
    with pytest.raises(SourceError, match="list.parquet is no manifest; these end in .jsonl, "):
        Manifest(folder / "list.parquet")


def test_tabs_mean_cells_and_quotes_nothing(folder):
    source = table(folder, 'id\tcaption\r\na\t5" nails\r\n\r\nb\tc\r\n', name="list.tsv")
    assert [triplet.caption for triplet in source] == ['5" nails', "c"]


MEASURE = r"""
import re, sys, time
from opt_jax.data.manifest import Manifest
def peak():  # KiB; what getrusage gives starts at the peak of the process that started this one
    return int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])
before, start = peak(), time.monotonic()
source = Manifest(sys.argv[1])
assert len(source) == 1_000_000 and len(source.class_names) == 80
assert source.caption(999_999) == "The ball number 999999 is red and round."
print(time.monotonic() - start, peak() - before >> 10)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["list.jsonl", "list.csv"])
def test_a_million_rows_open_in_bounded_memory(tmp_path, name):
    with open(tmp_path / name, "w") as file:
        if name == "list.csv":
            file.write("id,image,audio,caption,labels\n")
        for i in range(1_000_000):
            cells = [f"sample-{i:07d}", f"{i}.jpg", f"{i}.flac", f"The ball number {i} is red and round."]
            if name == "list.csv":
                file.write(",".join(cells) + f",c{i % 80}\n")
            else:
                row = dict(zip(("id", "image", "audio", "caption"), cells, strict=True))
                file.write(json.dumps(row | {"labels": [f"c{i % 80}"]}) + "\n")
    command = [sys.executable, "-c", MEASURE, str(tmp_path / name)]
    seconds, grown = subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).split()
    print(f"{name}: {float(seconds):.0f} s, {grown} MiB")
    assert 8 < int(grown) < 400


def test_storage_that_is_gone_is_no_matter_of_one_row(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(PNG)
    folder = (tmp_path / "pictures").resolve()
    assert read_file(folder, "a.png", "a", "image") == PNG
    with pytest.raises(UnusableSampleError, match="'b.png' cannot be read"):
        read_file(folder, "b.png", "b", "image")
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(SourceError, match="is its storage there"):
        read_file(folder, "a.png", "a", "image")
