"""Localized Narratives in small, as they are published."""

import json
import pickle

import numpy as np
import pytest
from raw_files import BAD_PICTURES, BAD_SOUNDS, file_of, picture, sound, tone

from opt_jax.data.localized_narratives import LocalizedNarratives
from opt_jax.data.sources import held_out
from opt_jax.data.triplet import Source, SourceError, UnusableSampleError

ROWS = [
    (
        "open_images_train",
        "0a1b2c3d4e5f6071",
        11,
        "open_images_train/open_images_train_0a1b2c3d4e5f6071_11.ogg",
    ),
    ("mscoco_train2017", "137576", 93, "coco_train/coco_train_137576_93.ogg"),
    ("mscoco_train2017", "137576", 94, "coco_train/coco_train_137576_94.ogg"),
    ("Flick30k", "4985599865", 5, "flickr30k_train/flickr30k_train_4985599865_1.ogg"),
    ("ADE20k", "ADE_train_00000008", 7, "ade20k_train/ade20k_train_00000008_7.ogg"),
]
PICTURES = [
    "0a1b2c3d4e5f6071",
    "train2017/000000137576",
    "flickr30k-images/4985599865",
    "training/ADE_train_00000008",
]
SOUNDS = [ROWS[0][3], ROWS[1][3], "flickr30k_train/flickr30k_train_0000004985599865_5.ogg", ROWS[4][3]]


def line(dataset, image, annotator, recording, **more):
    timed = [{"utterance": "A ball.", "start_time": 0.0, "end_time": 0.9}]
    row = {
        "dataset_id": dataset,
        "image_id": image,
        "annotator_id": annotator,
        "caption": f"A ball {annotator}.",
    }
    return (
        row
        | {"timed_caption": timed, "traces": [[{"x": 0.2, "y": -0.1, "t": 0.0}]]}
        | {"voice_recording": recording}
        | more
    )


@pytest.fixture
def folder(tmp_path):
    files = {f"images/{name}.jpg": file_of(picture(), "JPEG") for name in PICTURES}
    files |= {f"recordings/{name}": sound(tone(0.2, 48_000), 48_000, "OGG") for name in SOUNDS}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


def narratives(folder, *rows, **options) -> LocalizedNarratives:
    (folder / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return LocalizedNarratives(folder / "list.jsonl", **options)


def both(folder, *rows) -> LocalizedNarratives:
    return narratives(folder, *rows, images=folder / "images", recordings=folder / "recordings")


def test_narratives_of_all_four_data_sets(folder):
    source = both(folder, *(line(*row) for row in ROWS))
    assert isinstance(source, Source) and source.modalities == {"text", "image", "audio"}
    for index in (0, 1, 3, 4):
        triplet = source[index]
        assert triplet.id == "/".join(map(str, ROWS[index][:3]))
        assert triplet.image.shape == (10, 12, 3)
        assert triplet.audio.shape == (3200,) and np.abs(triplet.audio).max() > 0.3
        assert triplet.caption == f"A ball {ROWS[index][2]}." and triplet.speaker == str(ROWS[index][2])
    with pytest.raises(UnusableSampleError, match="94': audio 'coco_train/.*' cannot be read in .*: No such"):
        source[2]
    assert source.groups[1] == source.groups[2] and len(set(source.groups)) == 4
    assert pickle.loads(pickle.dumps(source))[1].id == source[1].id


def test_a_folder_that_is_not_given_is_a_modality_less(folder):
    rows = [line(*row) for row in ROWS]
    heard = narratives(folder, *rows, recordings=folder / "recordings")
    seen = narratives(folder, *rows, images=folder / "images")
    read = narratives(folder, *rows)
    assert (heard[0].image, seen[0].audio, read[0].image, read[0].audio) == (None,) * 4
    assert heard[0].audio is not None and seen[2].image is not None and len(list(read)) == 5
    assert heard.modalities == {"text", "audio"} and read.modalities == {"text"}
    assert len({json.dumps(source.fingerprint()) for source in (heard, seen, read)}) == 3
    with pytest.raises(SourceError, match="nowhere is no folder"):
        narratives(folder, *rows, images=folder / "nowhere")


def test_lists_of_captions_only_have_no_sound(folder):
    row = line(*ROWS[0])
    del row["voice_recording"]
    triplet = both(folder, row)[0]
    assert triplet.audio is None and triplet.image is not None


@pytest.mark.parametrize(
    "change, part, reason",
    [
        ({"image_id": None}, "id", "is made of dataset_id, image_id and annotator_id, which are"),
        ({"annotator_id": [1]}, "id", "is made of"),
        ({"image_id": "../../secret"}, "id", "looks like a path"),
        ({"caption": ""}, "caption", "is empty"),
        ({"caption": 5}, "caption", "is 5, expected text"),
        ({"voice_recording": "../x.ogg"}, "audio", "leaves the folder"),
        ({"voice_recording": 3}, "audio", "is 3, expected text"),
        ({"image_id": "1234"}, "image", "'1234.jpg' cannot be read in"),
    ],
)
def test_rows_that_are_refused(folder, change, part, reason):
    source = both(folder, line(*ROWS[1]), line(*ROWS[0]) | change, line(*ROWS[4]))
    with pytest.raises(UnusableSampleError, match=reason) as error:
        source[1]
    assert error.value.part == part
    assert [source[index].caption for index in (0, 2)] == ["A ball 93.", "A ball 7."]


def test_bad_files_cost_their_row(folder):
    (folder / "images" / f"{PICTURES[0]}.jpg").write_bytes(BAD_PICTURES["cmyk.jpg"][0])
    (folder / "recordings" / SOUNDS[1]).write_bytes(BAD_SOUNDS["silent.flac"][0])
    source = both(folder, *(line(*row) for row in ROWS))
    for index, reason in [(0, "CMYK"), (1, "is silent")]:
        with pytest.raises(UnusableSampleError, match=reason):
            source[index]
    assert source[3].audio is not None


def test_pictures_are_held_out_with_all_their_narratives(folder):
    rows = [line("mscoco_val2017", str(i % 30), i, "x.ogg") for i in range(90)]
    parts = {
        split: held_out(narratives(folder, *rows), split, 9) for split in ("train", "validation", "test")
    }
    pictures = {split: {triplet.id.split("/")[1] for triplet in part} for split, part in parts.items()}
    assert {split: len(part) for split, part in parts.items()} == {"train": 72, "validation": 9, "test": 9}
    assert {split: len(names) for split, names in pictures.items()} == {
        "train": 24,
        "validation": 3,
        "test": 3,
    }
    assert len(set.union(*pictures.values())) == 30
    again = held_out(narratives(folder, *rows), "test", 9)
    assert [triplet.id for triplet in again] == [triplet.id for triplet in parts["test"]]
