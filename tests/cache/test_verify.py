import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tiny_cache import SCHEMA, TinyExtractor, TinySource

from opt_jax.cache import CacheError, FeatureCache, build_cache
from opt_jax.cache.manifest import load_arrays, save_arrays
from opt_jax.cache.schema import caption_key, deserialize, serialize
from opt_jax.cache.shard import READER_OPTIONS, WRITER_OPTIONS
from opt_jax.cache.verify import main, verify

SHARD = "opt-train.array_record-00001-of-00004"


@pytest.fixture
def directory(tmp_path):
    build_cache(
        TinySource(), TinyExtractor(), tmp_path, {}, split="train", schema=SCHEMA, examples_per_shard=3
    )
    return tmp_path


def test_flipped_bit_is_found_and_named(directory):
    assert verify(directory) == []
    path = directory / SHARD
    content = path.read_bytes()
    named = set()
    for offset in [*range(100, 1500, 100), 65600, len(content) - 100]:
        damaged = bytearray(content)
        damaged[offset] ^= 16
        path.write_bytes(damaged)
        problems = verify(directory)
        assert problems and all(problem.startswith(SHARD) for problem in problems)
        assert "sha256" in problems[0]
        records = [row for row in range(3) if f"record {row} (id tiny-00{row + 3})" in " ".join(problems)]
        if len(records) == 1:
            (row,) = records
            named.add(row)
            with pytest.raises(CacheError, match=rf"{SHARD}, record {row} \(id tiny-00{row + 3}\)"):
                FeatureCache(directory)[row + 3]
            FeatureCache(directory)[(row + 1) % 3 + 3]
    assert named == {0, 1, 2}


def test_records_in_another_order_are_found_and_named(directory):
    path = os.fspath(directory / SHARD)
    records = ArrayRecordReader(path, READER_OPTIONS).read_all()
    writer = ArrayRecordWriter(path, WRITER_OPTIONS)
    for position in (1, 0, 2):
        writer.write(records[position])
    writer.close()
    problems = verify(directory)
    assert "sha256" in problems[0]
    assert problems[1:] == [
        f"{SHARD}: record {row} (id tiny-00{row + 3}) is damaged (checksum differs)" for row in (0, 1)
    ]


def flipped(path, number):
    """Writes the file with one bit flipped, a random one each time, and yields its position."""
    content = path.read_bytes()
    for bit in np.random.default_rng(number).choice(8 * len(content), number, replace=False).tolist():
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        yield bit


@pytest.mark.parametrize("flips", [60, pytest.param(3000, marks=pytest.mark.slow)])
def test_any_flipped_bit_of_a_shard_is_found(directory, flips):
    for bit in flipped(directory / SHARD, flips):
        problems = verify(directory)
        assert problems and all(problem.startswith(SHARD) for problem in problems), bit
        assert "records 0 to 2 (ids tiny-003 to tiny-005)" in problems[0]
        for row in range(3):
            # What is not named reads as it was written; what is named may be whole beside its damaged header.
            if not any(f"record {row} (id tiny-00{row + 3})" in problem for problem in problems[1:]):
                if "cannot be opened" not in problems[-1] and "expected records" not in problems[-1]:
                    assert FeatureCache(directory)[row + 3]["id"] == f"tiny-00{row + 3}"


@pytest.mark.parametrize("flips", [40, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["manifest.json", "rows.npz", "statistics.npz", "dataset_info.json"])
def test_any_flipped_bit_of_a_small_file_is_found(directory, name, flips):
    for bit in flipped(directory / name, flips):
        assert any(name in problem for problem in verify(directory)), bit
        with pytest.raises(CacheError, match=name):
            FeatureCache(directory)


def test_truncated_and_missing_shards(directory):
    path = directory / SHARD
    content = path.read_bytes()
    for size in [0, 1, 100, len(content) // 2, len(content) - 1]:
        path.write_bytes(content[:size])
        problems = verify(directory)
        assert all(problem.startswith(SHARD) for problem in problems)
        assert "records 0 to 2 (ids tiny-003 to tiny-005)" in problems[0]
        with pytest.raises(CacheError, match=SHARD):
            FeatureCache(directory)
    path.unlink()
    assert verify(directory) == [f"{SHARD}: missing, with records 0 to 2 (ids tiny-003 to tiny-005)"]
    with pytest.raises(CacheError, match=SHARD):
        FeatureCache(directory)


def test_edited_manifest_and_small_files(directory):
    path = directory / "manifest.json"
    original = path.read_text()
    content = json.loads(original)
    content["num_rows"] = 11
    path.write_text(json.dumps(content))
    assert "edited" in verify(directory)[0]
    with pytest.raises(CacheError, match="edited"):
        FeatureCache(directory)
    path.write_text("{")
    with pytest.raises(CacheError, match="damaged"):
        FeatureCache(directory)
    # The same content, written otherwise: somebody has been there.
    path.write_text('{"num_rows": 9,' + original[1:])
    assert "edited" in verify(directory)[0]
    for text in ("[]", "null", "3", '{"format": 1}', original.replace('"shards": [', '"shards": [3,')):
        path.write_text(text)
        assert "manifest.json is damaged" in verify(directory)[0]
    path.write_text(original)
    arrays = load_arrays(directory / "rows.npz")
    whole = (directory / "rows.npz").read_bytes()
    save_arrays(directory / "rows.npz", arrays | {"checksum": arrays["checksum"] + 1})
    assert verify(directory) == ["rows.npz: sha256 is not the manifest's"]
    rows = directory / "rows.npz"
    rows.write_bytes(whole)
    assert verify(directory) == []
    rows.write_bytes(rows.read_bytes() + b"x")
    assert verify(directory) == ["rows.npz: sha256 is not the manifest's"]
    with pytest.raises(CacheError, match="rows.npz"):
        FeatureCache(directory)


def test_stray_file_is_named(directory):
    (directory / "notes.txt").write_text("")
    assert verify(directory) == ["notes.txt: does not belong here"]


def test_command_line(directory):
    command = [sys.executable, "-m", "opt_jax.cache.verify", str(directory)]
    assert subprocess.run(command, capture_output=True).returncode == 0
    (directory / SHARD).unlink()
    damaged = subprocess.run(command, capture_output=True, text=True)
    assert damaged.returncode == 1 and SHARD in damaged.stdout


def test_what_is_said_of_damage_mends_it(directory, capsys, monkeypatch):
    path = directory / SHARD
    whole = {path.name: path.read_bytes() for path in directory.iterdir()}
    content = bytearray(whole[SHARD])
    content[-100] ^= 16  # of the same size: a build alone does not see it
    path.write_bytes(content)
    monkeypatch.setattr(sys, "argv", ["verify", str(directory)])
    assert main() == 1
    told = capsys.readouterr().out.splitlines()[-1]
    assert told == f"to mend it: delete {SHARD} and run the build again, which makes only missing shards anew"
    path.unlink()
    build_cache(
        TinySource(), TinyExtractor(), directory, {}, split="train", schema=SCHEMA, examples_per_shard=3
    )
    assert main() == 0 and {path.name: path.read_bytes() for path in directory.iterdir()} == whole
    (directory / "rows.npz").write_bytes(b"")
    assert main() == 1
    assert capsys.readouterr().out.endswith(f"to mend it: delete {directory} and build the cache again\n")


def test_missing_feature_is_an_error(directory):
    from tensorflow_datasets.proto import tf_example_pb2

    record = serialize(FeatureCache(directory)[0], SCHEMA)
    example = tf_example_pb2.Example.FromString(record)
    del example.features.feature["audio_features"]
    with pytest.raises(KeyError, match="audio_features"):
        deserialize(example.SerializeToString(), SCHEMA)


def test_pickled_cache_reads_on(directory):
    cache = FeatureCache(directory)
    cache[0]
    copy = pickle.loads(pickle.dumps(cache))
    np.testing.assert_array_equal(copy[5]["image_codes"], cache[5]["image_codes"])


def test_caption_key():
    assert caption_key("A red  circle.", "a") == caption_key("a red circle", "b")
    assert caption_key("a red circle", "a") != caption_key("a red square", "a")
    assert caption_key(None, "a") != caption_key(None, "b")
    assert 0 <= caption_key("a red circle", "a") < 2**31
    assert caption_key("red", "a") == 2053201807  # stays the same from version to version
