"""A small data set of TensorFlow Datasets, written as ArrayRecord and read without TensorFlow."""

import io
import pickle
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from raw_files import BAD_PICTURES, file_of, picture, sound, tone

from opt_jax.data.sources import open_splits
from opt_jax.data.tfds_source import TfdsSource
from opt_jax.data.triplet import Source, SourceError, UnusableSampleError

NAMES = ["cat", "ball", "dog"]
KIND = tfds.features
FEATURES = KIND.FeaturesDict(
    {
        "image": KIND.Image(),
        "image/id": KIND.Scalar(np.int64),
        "captions": KIND.Sequence({"text": KIND.Text()}),
        "objects": KIND.Sequence({"label": KIND.ClassLabel(names=NAMES)}),
        "kind": KIND.Text(),
        "pixels": KIND.Tensor(shape=(10, 12, 3), dtype=np.uint8),
        "file": KIND.Tensor(shape=(), dtype=np.str_),
        "wave": KIND.Tensor(shape=(None,), dtype=np.float32),
        "numbers": KIND.Tensor(shape=(None,), dtype=np.int16),
    }
)


def example(number, **changes):
    row = {
        "image": file_of(picture(seed=number)),
        "image/id": number + 100,
        "captions": [{"text": f"A ball {number}."}, {"text": "Round."}],
        "objects": [{"label": 2}, {"label": number % 2}],
        "kind": ["red", "blue"][number % 2],
        "pixels": np.asarray(picture(seed=number)),
        "file": sound(tone(), 16_000),
        "wave": tone(),
        "numbers": (tone(0.1, 8000) * 32767).astype(np.int16),
    }
    return row | changes


def write(folder, rows, split="train", features=FEATURES, file_format="array_record", damaged=()):
    directory = folder / "balls" / "1.0.0"
    directory.mkdir(parents=True, exist_ok=True)
    template = tfds.core.ShardedFileTemplate(
        dataset_name="balls", data_dir=directory, split=split, filetype_suffix=file_format
    )
    writer = ArrayRecordWriter(str(directory / f"balls-{split}.{file_format}-00000-of-00001"), "group_size:1")
    for number, row in enumerate(rows):
        row = row | {"image": io.BytesIO(row["image"])} if "image" in row else row
        content = features.serialize_example(features.encode_example(row))
        writer.write(content[:20] if number in damaged else content)
    writer.close()
    version = tfds.core.Version("1.0.0")
    identity = tfds.core.DatasetIdentity(
        name="balls", version=version, data_dir=str(directory), module_name="balls"
    )
    info = tfds.core.DatasetInfo(builder=identity, features=features, description="Balls.")
    info.set_file_format(file_format)
    known = []
    if (directory / "dataset_info.json").exists():
        info.read_from_directory(directory)
        known = list(info.splits.values())
    split_info = tfds.core.SplitInfo(
        name=split, shard_lengths=[len(rows)], num_bytes=1, filename_template=template
    )
    info.set_splits(tfds.core.splits.SplitDict([*known, split_info]))
    info.write_to_directory(directory)
    return folder


def test_files_captions_and_classes(tmp_path):
    write(tmp_path, [example(number) for number in range(4)])
    options = {"image": "image", "caption": "captions/text", "labels": "objects/label", "audio": "file"}
    source = TfdsSource("balls", "train", tmp_path, **options, id="image/id")
    assert isinstance(source, Source) and len(source) == 4
    assert source.class_names == ["ball", "cat", "dog"]
    triplet = source[1]
    assert (triplet.id, triplet.caption) == ("101", "A ball 1.")
    assert triplet.references == ("A ball 1.", "Round.")
    np.testing.assert_array_equal(triplet.image, np.asarray(picture(seed=1)))
    np.testing.assert_allclose(triplet.audio, tone(), atol=1e-4)
    assert triplet.labels == (0, 2) and source[2].labels == (1, 2)
    assert source.read(1, image=False, audio=False).image is None and source.caption(3) == "A ball 3."
    assert source.modalities == {"text", "image", "audio"}
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy[2].image, source[2].image)
    assert copy.fingerprint() == source.fingerprint()
    assert source.fingerprint() != TfdsSource("balls", "train", tmp_path, image="image").fingerprint()
    with pytest.raises(IndexError):
        source[4]
    assert "tensorflow" not in sys.modules


def test_arrays_and_texts(tmp_path):
    write(tmp_path, [example(number) for number in range(3)])
    options = {"image": "pixels", "caption": "kind", "labels": "kind"}
    source = TfdsSource("balls:1.0.0", "train", str(tmp_path), **options, audio="numbers", rate="8000")
    triplet = source[1]
    assert (triplet.id, triplet.caption) == ("train-1", "blue")
    assert source.class_names == ["blue", "red"] and triplet.labels == (0,)
    np.testing.assert_array_equal(triplet.image, np.asarray(picture(seed=1)))
    np.testing.assert_allclose(triplet.audio[200:-200], tone()[200:-200], atol=2e-3)
    floats = TfdsSource("balls", "train", tmp_path, audio="wave", labels="objects/label")
    np.testing.assert_array_equal(floats[0].audio, tone())
    assert floats[0].image is None and floats.modalities == {"audio"}
    assert floats.class_names == ["ball", "cat", "dog"] and len(set(floats.groups)) == 3


def test_a_bad_record_costs_its_sample(tmp_path):
    rows = [
        example(0),
        example(1, image=BAD_PICTURES["cmyk.jpg"][0]),
        example(2),
        example(3, captions=[]),
        example(4, wave=np.zeros(0, np.float32)),
        example(5, wave=np.zeros(900, np.float32)),
        example(6, captions=[{"text": b"\xff"}]),
        example(7, **{"image/id": 100}),
        example(8),
    ]
    write(tmp_path, rows, damaged=(2,))
    options = {"image": "image", "caption": "captions/text", "audio": "wave", "id": "image/id"}
    source = TfdsSource("balls", "train", tmp_path, **options)
    for index, reason in [
        (1, "'101': image has the four colours"),
        (2, "'train-2': row cannot be read"),
        (5, "'105': audio is silent"),
        (6, "'train-6': row has features of another kind"),
        (7, "'100': id occurs in an earlier row"),
    ]:
        with pytest.raises(UnusableSampleError, match=reason):
            source[index]
    assert source[3].caption is None and source[4].audio is None
    assert source[0].image is not None and source[8].audio is not None


def test_splits_are_those_of_the_data_set(tmp_path):
    for split, count in [("train", 5), ("val", 2), ("test", 3)]:
        write(tmp_path, [example(number) for number in range(count)], split)
    spec = f"tfds:balls,data_dir={tmp_path},caption=kind,labels=kind"
    splits = open_splits(f"{spec},validation=val")
    assert {split: len(source) for split, source in splits.items()} == {
        "train": 5,
        "validation": 2,
        "test": 3,
    }
    held = open_splits(f"{spec},split=train,hold_out=1")
    assert {split: len(source) for split, source in held.items()} == {"train": 3, "validation": 1, "test": 1}
    with pytest.raises(SourceError, match="split 'validation', cannot be opened: Unknown split"):
        open_splits(spec)


def test_data_sets_that_are_refused(tmp_path):
    with pytest.raises(SourceError, match=r"tfds:none, split 'train', cannot be opened(.|\n)*array_record"):
        TfdsSource("none", "train", tmp_path)
    write(tmp_path, [example(0)])
    with pytest.raises(SourceError, match="tfds:balls has no feature 'captions/words'; it has .*captions"):
        TfdsSource("balls", "train", tmp_path, caption="captions/words")
    with pytest.raises(SourceError, match="rate=1 is not"):
        TfdsSource("balls", "train", tmp_path, rate="1")
    for part, feature, reason in [("image", "image/id", "of another kind"), ("audio", "pixels", "is uint8")]:
        with pytest.raises(UnusableSampleError, match=reason):
            TfdsSource("balls", "train", tmp_path, **{part: feature})[0]
    write(tmp_path / "records", [example(0)], file_format="tfrecord")
    with pytest.raises(SourceError, match=r"cannot be opened(.|\n)*array_record"):
        TfdsSource("balls", "train", tmp_path / "records")
