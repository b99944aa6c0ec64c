"""Spoken Scenes as generated: the same bytes again, disjoint splits, complete records, resumption."""

import filecmp
import importlib
import json
import pickle
import shutil
import sys

import numpy as np
import pytest

from opt_jax.data.spoken_scenes import SpokenScenes, default_config, generate
from opt_jax.data.triplet import Source, SourceError

generation = importlib.import_module("opt_jax.data.spoken_scenes.generation")


def _config():
    config = default_config()
    config.update(train=7, validation=2, test=3, shard_size=4)
    return config


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("world")
    assert generate(directory, _config(), seed=3) == {"train": 7, "validation": 2, "test": 3}
    return directory


def _assert_same_files(a, b):
    names = sorted(str(path.relative_to(a)) for path in a.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(b)) for path in b.rglob("*") if path.is_file())
    equal, different, failed = filecmp.cmpfiles(a, b, names, shallow=False)
    assert len(equal) == len(names), (different, failed)


def test_interrupted_generation_resumes_to_the_same_bytes(world, tmp_path, monkeypatch):
    run_process, made = generation._run_process, []

    def killed_at_the_second(task, running):
        made.append(task.path)
        if len(made) == 2:
            (tmp_path / "train" / "train.array_record-00001-of-00002.writing1").write_text("half a shard")
            yield 1, "killed"
        else:
            yield from run_process(task, running)

    monkeypatch.setattr(generation, "_run_process", killed_at_the_second)
    with pytest.raises(RuntimeError, match="killed"):
        generate(tmp_path, _config(), seed=3, processes=1)
    with pytest.raises(SourceError, match="manifest.json is missing"):
        SpokenScenes(tmp_path, "train")

    generate(tmp_path, _config(), seed=3, processes=1)
    assert len(made) == 2 + 3 and made[0] not in made[2:]  # the shard that was finished is not made again
    _assert_same_files(world, tmp_path)

    generate(tmp_path, _config(), seed=3, processes=1)  # all there: nothing to do
    assert len(made) == 5 and generation.has_all_shards(tmp_path)
    next((tmp_path / "test").glob("*.array_record-*")).unlink()
    assert not generation.has_all_shards(tmp_path)
    generate(tmp_path, _config(), seed=3, processes=1)
    assert len(made) == 6  # of that split alone
    _assert_same_files(world, tmp_path)
    with pytest.raises(ValueError, match="other settings"):
        generate(tmp_path, _config(), seed=4)


def test_a_failing_shard_says_why(tmp_path):
    config = _config()
    config.voices.train = ("en-us+m1", "en-us+nobody")
    with pytest.raises(SourceError, match="train.array_record-00000.*no voice 'en-us.nobody'.*mend that"):
        generate(tmp_path, config, seed=0, processes=1)


def test_test_voices_must_be_unheard(tmp_path):
    config = _config()
    config.voices.test = (config.voices.train[2],)
    with pytest.raises(ValueError, match="voices.test shares"):
        generate(tmp_path, config, seed=0)


def test_default_voices():
    voices = default_config().voices
    assert len(voices.train) >= 12 and len(voices.test) == 4
    variants = {split: {voice.split("+")[1] for voice in voices[split]} for split in voices}
    assert not variants["train"] & (variants["validation"] | variants["test"])


def test_missing_synthesizer_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e '\.\[demo\]'"):
        generate(tmp_path, _config(), seed=0)


def test_samples_are_complete(world):
    config = _config()
    for split, references in (("train", 1), ("validation", 5), ("test", 5)):
        source = SpokenScenes(world, split)
        assert isinstance(source, Source) and len(source) == config[split]
        for index in range(len(source)):
            sample = source[index]
            assert sample.id == f"{split}-{index:06d}"
            assert sample.image.shape == (128, 128, 3) and sample.image.dtype == np.uint8
            assert sample.audio.dtype == np.float32 and sample.audio.ndim == 1
            assert 0.7 < len(sample.audio) / 16_000 < 6
            assert 0.03 < np.sqrt(np.mean(sample.audio**2)) < 0.15 and np.abs(sample.audio).max() < 0.96
            assert len(set(sample.references)) == references and sample.references[0] == sample.caption
            assert sample.caption == source.caption(index)
            assert sample.boxes.shape == (len(sample.classes), 4) and sample.boxes.dtype == np.float32
            assert sample.labels == tuple(sorted(int(c) - 1 for c in sample.classes))
            assert 1 <= len(sample.named) <= 3 and max(sample.named) < len(sample.boxes)
            assert sample.speaker in config.voices[split]
            row = source.row(index)
            names = {source.class_names[c - 1] for c in sample.classes}
            assert {" ".join(name.split()[1:]) for name in row["objects"]} == names
            assert row["seconds"] == pytest.approx(len(sample.audio) / 16_000, abs=1e-3)


def test_parts_and_pickles(world):
    source = SpokenScenes(world, "train")
    whole = source[5]  # in the second shard
    copy = pickle.loads(pickle.dumps(source))
    picture = copy.read(5, audio=False)
    sound = copy.read(5, image=False)
    assert picture.audio is None and sound.image is None
    assert np.array_equal(picture.image, whole.image) and np.array_equal(sound.audio, whole.audio)
    with pytest.raises(IndexError, match="sample 7"):
        source[7]


def test_a_damaged_shard_is_named(world, tmp_path):
    shutil.copytree(world, tmp_path / "world")
    shard = sorted((tmp_path / "world" / "train").glob("*.array_record*"))[0]
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.raises(SourceError, match=f"{shard.name}.*delete"):
        [SpokenScenes(tmp_path / "world", "train")[index] for index in range(3)]
    (tmp_path / "world" / "test" / "manifest.json").write_text("{")
    with pytest.raises(SourceError, match="manifest.json is missing or damaged"):
        SpokenScenes(tmp_path / "world", "test")


def test_fingerprints_tell_splits_apart(world):
    prints = [json.dumps(SpokenScenes(world, split).fingerprint()) for split in ("train", "test", "test")]
    assert prints[0] != prints[1] == prints[2]
