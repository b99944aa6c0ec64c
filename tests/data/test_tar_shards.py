"""Shards as WebDataset and img2dataset write them, and broken ones."""

import json
import pickle
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from raw_files import BAD_PICTURES, PNG, file_of, picture, shard, tone, whole

from opt_jax.data.tar_shards import TarShards
from opt_jax.data.triplet import Source, SourceError, UnusableSampleError


def only_bad(tmp_path, *members, sample_id="bad"):
    """The error of a sample between two good ones, which can be read."""
    source = TarShards([shard(tmp_path / "a.tar", [*whole("good"), *members, *whole("last")])])
    assert len(source) == 3
    assert source[0].image is not None and source[2].audio is not None
    with pytest.raises(UnusableSampleError) as error:
        source[1]
    assert error.value.sample_id == sample_id
    return str(error.value)


def test_members_of_one_name_are_one_sample(tmp_path):
    fields = {
        "caption": "Not this.",
        "labels": ["dog"],
        "references": ["Round."],
        "url": "x",
        "speaker": "ann",
    }
    first = shard(
        tmp_path / "a.tar", [*whole("d/0", json=json.dumps(fields).encode()), ("d/0.seg.png", b"no")]
    )
    second = shard(tmp_path / "b.tar", [("d/", tarfile.DIRTYPE, ""), ("d/1.JPG", file_of(picture(), "JPEG"))])
    source = TarShards([first, second])
    assert isinstance(source, Source) and len(source) == 2 and source.class_names == ["dog"]
    triplet = source[0]
    assert (triplet.id, triplet.caption, triplet.speaker) == ("d/0", "A ball.", "ann")
    assert triplet.references == ("A ball.", "Round.") and triplet.labels == (0,)
    with pytest.raises(IndexError):
        source[2]
    assert source[1].id == "d/1" and source[1].image.shape == (10, 12, 3) and source[1].caption is None
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy[1].image, source[1].image)
    assert copy.fingerprint() == json.loads(json.dumps(source.fingerprint()))


def test_other_words_of_the_same_length_are_another_source(tmp_path):
    path, prints = tmp_path / "a.tar", []
    for words in (b"A red ball.", b"A red bowl.", b"A red ball."):
        prints.append(TarShards([shard(path, whole("a") + [("b.txt", words)])]).fingerprint())
    assert prints[0] == prints[2] != prints[1]


def test_pixels_and_sound(tmp_path):
    triplet = TarShards([shard(tmp_path / "a.tar", whole("0"))])[0]
    np.testing.assert_array_equal(triplet.image, np.asarray(picture()))
    np.testing.assert_allclose(triplet.audio, tone(), atol=1e-4)


def test_the_caption_of_json_where_there_is_no_text(tmp_path):
    source = TarShards([shard(tmp_path / "a.tar", [("0.json", b'{"caption": "A ball."}'), ("0.png", PNG)])])
    assert source[0].caption == "A ball."


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_a_bad_picture_costs_its_sample(tmp_path, name):
    content, reason = BAD_PICTURES[name]
    extension = name.partition(".")[2]
    message = only_bad(tmp_path, (f"bad.{extension}", content), ("bad.txt", b"A ball."))
    assert message.startswith("sample 'bad': image ")


@pytest.mark.parametrize(
    "member, reason",
    [
        (("bad.txt", b""), "caption is empty"),
        (("bad.txt", b"a\0b"), "caption holds NUL"),
        (("bad.txt", b"\xff\xfe"), "caption 'bad.txt' is no valid UTF-8"),
        (("bad.txt", b"x" * (1 << 20)), "caption has 1048576 characters"),
        (("bad.txt", b"x" * (2 << 20)), "caption 'bad.txt' has over 1 MiB"),
        (("bad.json", b"{"), "row has a .json that is no valid JSON"),
        (("bad.json", b"[]"), "row has a .json that holds list"),
        (("bad.json", b"[" * 100_000), "row has a .json that is no valid JSON"),
        (("bad.json", b'{"labels": "dog"}'), "labels is 'dog', expected a list"),
        (("bad.png", tarfile.SYMTYPE, "/etc/passwd"), "row 'bad.png' is a link or device"),
        (("bad.png", tarfile.LNKTYPE, "good.png"), "row 'bad.png' is a link or device"),
        (("bad.png", tarfile.FIFOTYPE, ""), "row 'bad.png' is a link or device"),
        (("bad.zip", b"x"), "row has neither image nor caption nor audio"),
        (("good.png", PNG), None),
    ],
)
def test_a_bad_member_costs_its_sample(tmp_path, member, reason):
    if reason is None:
        members = [*whole("good"), *whole("other"), member, *whole("last")]
        source = TarShards([shard(tmp_path / "a.tar", members)])
        with pytest.raises(UnusableSampleError, match="'good': id occurs in an earlier row"):
            source[2]
        return
    assert reason in only_bad(tmp_path, member)


@pytest.mark.parametrize("name", ["../bad.png", "/bad.png", "a/../../bad.png", r"..\bad.png"])
def test_members_that_leave_the_shard(tmp_path, name):
    assert "leaves the folder" in only_bad(
        tmp_path, (name, PNG), sample_id=name[:-4] if "/" in name else name
    )


def test_a_name_that_is_no_utf8(tmp_path):
    source = TarShards([shard(tmp_path / "a.tar", [("b\udcff.png", PNG), *whole("last")])])
    assert [triplet.id for triplet in source] == ["b\ufffd", "last"]


def test_shards_that_cannot_be_read(tmp_path):
    good = shard(tmp_path / "good.tar", whole("0"))
    (tmp_path / "text.tar").write_bytes(b"not found" * 1000)
    packed = shard(tmp_path / "packed.tar", whole("0"), "w:gz")
    for path in (tmp_path / "text.tar", packed, tmp_path / "none.tar"):
        with pytest.raises(SourceError, match=f"{path} cannot be read as an uncompressed tar file"):
            TarShards([good, path])
    with pytest.raises(SourceError, match="no tar shards"):
        TarShards([])


def damaged_in(kind: str, content: bytes) -> tuple[bytes, int]:
    """A shard's content with one damage, and the byte where it is. Every member here takes 1,024 bytes."""
    if kind == "a flipped bit in a header":
        return content[:2150] + bytes([content[2150] ^ 4]) + content[2151:], 2048
    if kind == "cut between members":
        return content[:2048], 2048
    if kind == "cut in a member":
        return content[:2700], 3072
    if kind == "zeros in the middle":
        return content[:2048] + bytes(1024) + content[3072:], 3072
    return content[:4096], 4096  # the mark of the end is missing


@pytest.mark.parametrize(
    "kind",
    [
        "a flipped bit in a header",
        "cut between members",
        "cut in a member",
        "zeros in the middle",
        "without its end",
    ],
)
def test_what_a_damaged_shard_loses_is_told_and_costs_no_other(tmp_path, kind):
    words = [(f"{number}.txt", b"A red ball.") for number in range(4)]
    path, other = shard(tmp_path / "a.tar", words), shard(tmp_path / "b.tar", [("9.txt", b"A box.")])
    content, place = damaged_in(kind, path.read_bytes())
    path.write_bytes(content)
    source = TarShards([path, other])
    assert source[len(source) - 1].id == "9"
    with pytest.raises(UnusableSampleError, match=f"sample 'a.tar': .* damaged or cut at byte {place}; what"):
        source[len(source) - 2]
    assert source.caption(len(source) - 2) is None and source[0].caption == "A red ball."


def test_shards_that_begin_with_the_same_names(tmp_path):
    paths = [shard(tmp_path / f"{name}.tar", whole("0")) for name in "ab"]
    with pytest.raises(UnusableSampleError, match="occurs in an earlier row"):
        TarShards(paths)[1]
    assert [triplet.id for triplet in TarShards(paths, ids="shards")] == ["a/0", "b/0"]
    with pytest.raises(SourceError, match="ids=all; choose members or shards"):
        TarShards(paths, ids="all")


def test_what_is_ignored_is_told(tmp_path):
    fields = json.dumps({"caption": "A ball.", "text": "x"}).encode()
    names = ("0.caption", "0.seg.png", "._0.txt", "1.caption")
    members = [("0.json", fields), *((name, b"x") for name in names)]
    with pytest.warns(UserWarning, match=r"nothing is made of\n  .caption, 2 members\n") as told:
        source = TarShards([shard(tmp_path / "a.tar", members)])
    assert ".seg.png, 1 members" in str(told[0].message) and "'text' of .json" in str(told[0].message)
    assert source[0].caption == "A ball." and len(source) == 2


def test_a_shard_that_was_cut_after_opening(tmp_path):
    path = shard(tmp_path / "a.tar", [*whole("0"), *whole("1")])
    source = TarShards([path])
    path.write_bytes(path.read_bytes()[:1024])
    with pytest.raises(UnusableSampleError, match="'1.txt': .*a.tar ends after 0 of its 7 bytes"):
        source[1]


MEASURE = r"""
import re, sys, time
from opt_jax.data.tar_shards import TarShards
def peak():
    return int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])
before, start = peak(), time.monotonic()
assert len(TarShards([sys.argv[1]])) == 200_000
print(time.monotonic() - start, peak() - before >> 10)
"""


@pytest.mark.slow
def test_many_members_open_in_bounded_memory(tmp_path):
    path = shard(
        tmp_path / "a.tar",
        (member for i in range(200_000) for member in whole(f"{i:09d}", png=b"-", wav=b"-")),
    )
    command = [sys.executable, "-c", MEASURE, str(path)]
    seconds, grown = subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).split()
    print(f"600,000 members: {float(seconds):.0f} s, {grown} MiB")
    assert 4 < int(grown) < 150
