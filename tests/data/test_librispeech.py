"""LibriSpeech in small, in the folders and lists that it is published in."""

import os
import pickle

import numpy as np
import pytest
from raw_files import sound, tone

from opt_jax.data.librispeech import LibriSpeech
from opt_jax.data.sources import held_out, open_splits
from opt_jax.data.triplet import Source, SourceError, UnusableSampleError


def chapter(folder, speaker: int, number: int, *transcripts: str, recordings=None):
    """Utterances of a chapter, 0000 and on, with as many recordings."""
    place, stem = folder / str(speaker) / str(number), f"{speaker}-{number}"
    place.mkdir(parents=True, exist_ok=True)
    lines = "".join(f"{stem}-{at:04d} {text}\n" for at, text in enumerate(transcripts))
    (place / f"{stem}.trans.txt").write_bytes(lines.encode())
    for at in range(len(transcripts) if recordings is None else recordings):
        (place / f"{stem}-{at:04d}.flac").write_bytes(sound(tone(0.1 + 0.01 * at), 16_000, "FLAC"))
    return place


def refused(source, index: int, reason: str):
    with pytest.raises(UnusableSampleError, match=reason):
        source[index]


def test_a_split(tmp_path):
    chapter(tmp_path, 1089, 134686, "HE HOPED THERE WOULD BE STEW", "STUFF IT INTO YOU HIS BELLY'S")
    chapter(tmp_path, 121, 121726, "ALSO A POPULAR CONTRIVANCE")
    (tmp_path / "README.TXT").write_text("About.")
    (tmp_path / "notes").mkdir()
    source = LibriSpeech(tmp_path)
    assert isinstance(source, Source) and source.modalities == {"text", "audio"}
    assert [(row.id, row.caption, row.speaker) for row in source] == [
        ("1089-134686-0000", "he hoped there would be stew", "1089"),
        ("1089-134686-0001", "stuff it into you his belly's", "1089"),
        ("121-121726-0000", "also a popular contrivance", "121"),
    ]
    assert source[1].references == (source[1].caption,) and source[1].image is None
    np.testing.assert_allclose(source[1].audio, tone(0.11), atol=1e-4)
    assert source.groups[0] == source.groups[1] != source.groups[2]
    assert pickle.loads(pickle.dumps(source)).caption(2) == "also a popular contrivance"
    with pytest.raises(IndexError):
        source[3]
    before = source.fingerprint()
    assert LibriSpeech(tmp_path).fingerprint() == before
    chapter(tmp_path, 121, 121726, "ALSO A POPULAR CONTRIVANCES")
    after = LibriSpeech(tmp_path).fingerprint()
    assert {key for key in before if before[key] != after[key]} == {"sha256", "rows_sha256"}


def test_all_splits_by_name(tmp_path):
    for number, split in enumerate(["train-clean-100", "dev-clean", "test-clean"]):
        chapter(tmp_path / split, 10 + number, 5, f"OF {split}".upper())
    names = "train=train-clean-100,validation=dev-clean,test=test-clean"
    splits = open_splits(f"librispeech:{tmp_path}/{{split}},{names}")
    assert {split: source[0].caption for split, source in splits.items()} == {
        "train": "of train-clean-100",
        "validation": "of dev-clean",
        "test": "of test-clean",
    }


def test_speakers_are_held_out_whole(tmp_path):
    for speaker in range(20):
        chapter(tmp_path, speaker, 1, "A", "B", recordings=0)
    source = LibriSpeech(tmp_path)
    speakers = {
        split: {part.read(index, audio=False).speaker for index in range(len(part))}
        for split in ("train", "validation", "test")
        for part in [held_out(source, split, 4)]
    }
    assert sum(map(len, speakers.values())) == 20 and len(speakers["test"]) >= 2


def test_bad_rows_cost_themselves(tmp_path):
    place = chapter(tmp_path, 1, 2, "ONE", "TWO", recordings=1)
    with open(place / "1-2.trans.txt", "ab") as file:
        file.write(b"\n1-2-0002\n1-2-0003 \xff\r\n1-3-0000 OF ANOTHER\n../0004 OUT\n1-2-0000 AGAIN\r\n")
    for name in ("1-2-0009.flac", "odd.flac", " .flac", os.fsdecode(b"1-2-\xff.flac")):
        (place / name).write_bytes(b"")
    (place / "1-2-0008.wav").write_bytes(b"")
    chapter(tmp_path, 2, 3, "GONE", "GONE").joinpath("2-3.trans.txt").unlink()
    source = LibriSpeech(tmp_path)
    assert source[0].caption == "one"
    reasons = [
        r"'1-2-0001': audio '1/2/1-2-0001.flac' cannot be read",
        r"'1-2-0002': caption has no transcript in 1/2/1-2.trans.txt",
        r"'1-2-0003': caption is no valid UTF-8 in 1/2/1-2.trans.txt",
        r"'1/2/1-2.trans.txt, row 5': id is '1-3-0000', expected 1-2-NUMBER",
        r"row 6': id is '../0004', expected",
        r"'1-2-0000': id occurs in an earlier row",
        r"'1/2, a recording': id is '', expected 1-2-NUMBER",
        r"'1-2-0009': caption has no transcript",
        r"id is '1-2-\\\\xff', expected",
        r"id is 'odd', expected",
        r"'2-3-0000': caption has no transcript in 2/3/2-3.trans.txt",
        r"'2-3-0001': caption has no transcript",
    ]
    assert len(source) == len(reasons) + 1
    for index, reason in enumerate(reasons, 1):
        refused(source, index, reason)


def test_folders_that_are_refused(tmp_path):
    with pytest.raises(SourceError, match="nowhere cannot be read: No such file"):
        LibriSpeech(tmp_path / "nowhere")
    with pytest.raises(SourceError, match="holds no SPEAKER/CHAPTER.*such as LibriSpeech/test-clean"):
        LibriSpeech(tmp_path)
    place = chapter(tmp_path / "test-clean", 1, 2, "ONE")
    with pytest.raises(SourceError, match="name the folder of one split"):
        LibriSpeech(tmp_path)
    (tmp_path / "elsewhere").write_text("1-2-0000 SECRET\n")
    (place / "1-2.trans.txt").unlink()
    (place / "1-2.trans.txt").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SourceError, match="1-2.trans.txt cannot be read: .* is a link that leaves"):
        LibriSpeech(tmp_path / "test-clean")
    (place / "1-2.trans.txt").unlink()
    os.mkfifo(place / "1-2.trans.txt")
    with pytest.raises(SourceError, match="1-2.trans.txt cannot be read: .* is no file"):
        LibriSpeech(tmp_path / "test-clean")
