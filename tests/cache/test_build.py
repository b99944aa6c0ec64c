import dataclasses
import json
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from tiny_cache import SCHEMA, TinyExtractor, TinySource

from opt_jax.cache import CacheError, FeatureCache, FingerprintMismatch, Schema, build_cache, shard
from opt_jax.cache.builder import intact
from opt_jax.cache.ids import Ids, pack
from opt_jax.cache.verify import verify
from opt_jax.data.triplet import SourceError, UnusableSampleError

FINGERPRINT = {"source": {"seed": 0}, "encoders": {"dvae": "abc"}}


def build(directory, source=None, extractor=None, fingerprint=FINGERPRINT, **arguments):
    arguments = {"split": "train", "schema": SCHEMA, "examples_per_shard": 3} | arguments
    return build_cache(
        source or TinySource(), extractor or TinyExtractor(), directory, fingerprint, **arguments
    )


def contents(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_reads_back_what_was_extracted(tmp_path):
    manifest = build(tmp_path)
    cache = FeatureCache(tmp_path, FINGERPRINT)
    source, extractor = TinySource(), TinyExtractor()
    assert len(cache) == 10 and [shard.rows for shard in manifest.shards] == [3, 3, 3, 1]
    for row in range(10):
        triplet, example = source[row], cache[row]
        (expected,) = extractor.extract([triplet])
        assert example["id"] == cache.ids[row] == triplet.id
        assert example["caption"] == (triplet.caption or "")
        assert json.loads(example["references"]) == list(triplet.references)
        assert example["labels"].tolist() == [row % 3] and example["index"] == row
        for name in ("text_ids", "region_boxes", "region_classes", "region_scores", "image_codes"):
            np.testing.assert_array_equal(example[name], expected.get(name, example[name][:0]))
        for name in ("region_features", "audio_features"):
            np.testing.assert_array_equal(
                example[name], np.asarray(expected.get(name, example[name][:0])).astype(np.float16)
            )
        assert example["present"].tolist() == [row != 9, row != 4, row != 7]
    assert cache[4]["region_features"].shape == (0, 4) and cache[7]["audio_features"].shape == (0, 3)
    assert cache.text_lengths.tolist() == [3, 4, 5, 3, 4, 5, 3, 4, 5, 0]
    assert cache.frame_counts.tolist() == [2, 3, 4, 5, 2, 3, 4, 0, 2, 3]
    with pytest.raises(IndexError):
        cache[10]


def test_statistics_are_those_of_the_stored_features_whatever_the_shards(tmp_path):
    build(tmp_path / "a")
    build(tmp_path / "b", examples_per_shard=7)
    cache, other = FeatureCache(tmp_path / "a"), FeatureCache(tmp_path / "b")
    frames = np.concatenate([cache[row]["audio_features"] for row in range(10)]).astype(np.float64)
    regions = np.concatenate([cache[row]["region_features"] for row in range(10)]).astype(np.float64)
    np.testing.assert_allclose(cache.audio_mean, frames.mean(0), rtol=1e-6)
    np.testing.assert_allclose(cache.audio_deviation, frames.std(0), rtol=1e-5)
    np.testing.assert_allclose(cache.region_mean, regions.mean(0), rtol=1e-6)
    np.testing.assert_allclose(cache.region_deviation, regions.std(0), rtol=1e-5)
    np.testing.assert_allclose(other.region_deviation, cache.region_deviation, rtol=1e-6)


def test_interrupted_build_goes_on_and_ends_with_the_same_bytes(tmp_path):
    build(tmp_path / "whole")

    def fail(call):
        if call == 2:
            raise RuntimeError("power cut")

    broken = TinyExtractor(before=fail)
    with pytest.raises(RuntimeError, match="power cut"):
        build(tmp_path / "cut", extractor=broken)
    with pytest.raises(CacheError, match="not finished"):
        FeatureCache(tmp_path / "cut")
    again = TinyExtractor()
    build(tmp_path / "cut", extractor=again)
    assert len(broken.seen) == 6 and again.seen == [f"tiny-{row:03d}" for row in range(6, 10)]
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    finished = TinyExtractor()
    build(tmp_path / "cut", extractor=finished)
    assert not finished.seen


def test_two_builds_in_one_directory_are_refused(tmp_path):
    def meanwhile(call):
        with pytest.raises(CacheError, match="another process builds in .*cache; wait for it"):
            build(tmp_path / "cache")

    build(tmp_path / "cache", extractor=TinyExtractor(before=meanwhile))
    build(tmp_path / "cache")  # it is there, and free again


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_damaged_shard_alone_is_made_again(tmp_path, capsys, damage):
    build(tmp_path / "cache")
    before = contents(tmp_path / "cache")
    path = next(path for path in (tmp_path / "cache").iterdir() if "00001-of" in path.name)
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-7])
    assert not intact(tmp_path / "cache")
    with pytest.raises(CacheError, match=f"{path.name}.*only what is damaged is made anew"):
        FeatureCache(tmp_path / "cache")
    again = TinyExtractor()
    build(tmp_path / "cache", extractor=again)
    assert again.seen == [f"tiny-{row:03d}" for row in range(3, 6)] and path.name in capsys.readouterr().out
    assert contents(tmp_path / "cache") == before and intact(tmp_path / "cache")


def test_a_shard_that_becomes_another_is_refused(tmp_path):
    class Other(TinyExtractor):
        def _one(self, triplet):
            arrays = super()._one(triplet)
            return arrays | {"audio_features": arrays["audio_features"] + 1}

    build(tmp_path / "cache")
    whole = contents(tmp_path / "cache")
    (name,) = (name for name in whole if "00001-of" in name)
    (tmp_path / "cache" / name).unlink()
    for _ in range(2):  # what was made is not there the second time
        with pytest.raises(CacheError, match=f"cache/{name} was made again and is not what it was"):
            build(tmp_path / "cache", extractor=Other())
    assert contents(tmp_path / "cache").keys() == whole.keys() - {name}
    with pytest.raises(CacheError, match=name):
        FeatureCache(tmp_path / "cache")
    build(tmp_path / "cache")
    assert contents(tmp_path / "cache") == whole


def test_an_interrupted_mend_goes_on(tmp_path):
    def fail(call):
        if call == 1:
            raise RuntimeError("power cut")

    build(tmp_path / "cache")
    whole = contents(tmp_path / "cache")
    for name in [name for name in whole if "00001-of" in name or "00002-of" in name]:
        (tmp_path / "cache" / name).unlink()
    with pytest.raises(RuntimeError, match="power cut"):
        build(tmp_path / "cache", extractor=TinyExtractor(before=fail))
    again = TinyExtractor()
    build(tmp_path / "cache", extractor=again)
    assert again.seen == [f"tiny-{row:03d}" for row in range(6, 9)]
    assert contents(tmp_path / "cache") == whole


def test_shards_that_changed_places_are_noticed(tmp_path):
    class Same(TinySource):  # rows of equal sizes
        def __getitem__(self, row):
            return dataclasses.replace(super().__getitem__(row % 2), id=f"same-{row:03d}")

    build(tmp_path, source=Same(), examples_per_shard=2)
    one, two = (tmp_path / f"opt-train.array_record-0000{n}-of-00005" for n in (0, 1))
    assert one.stat().st_size == two.stat().st_size
    aside = one.rename(tmp_path / "aside")
    two.rename(one)
    aside.rename(two)
    with pytest.raises(CacheError, match="record 1 .*holds row 3 of the source, expected 1"):
        FeatureCache(tmp_path)[1]


def test_a_disk_without_room_is_told(tmp_path):
    class Full:
        def __init__(self, *arguments):
            pass

        def write(self, record):
            raise RuntimeError("write() failed: No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard, "ArrayRecordWriter", Full)
        with pytest.raises(CacheError, match="No space left on device\nIs the disk full"):
            build(tmp_path / "cache")
    build(tmp_path / "cache")


def test_a_long_name_costs_its_own_bytes_only():
    names = ["a", "é" * 500, "", "b"]
    arrays = pack(names)
    assert list(Ids(arrays)) == names and sum(array.nbytes for array in arrays.values()) == 1002 + 4 * 4


def test_bad_rows_are_set_aside(tmp_path):
    class Silent(TinyExtractor):
        def _one(self, triplet):
            arrays = super()._one(triplet)
            if triplet.id == "tiny-005":
                arrays["audio_features"] = np.zeros((0, 3))
            if triplet.id == "tiny-006":
                arrays["region_features"] = np.full((1, 4), 1e6)
            return arrays

    class Mixed(TinySource):
        def __getitem__(self, row):
            if row == 1:
                raise UnusableSampleError("tiny-001", "image", "is no picture")
            return super().__getitem__(row)

        def origin(self, row):
            return "web" if row < 5 else "books"

    manifest = build(tmp_path, Mixed(broken=(0, 2)), Silent(rejected=("tiny-003",)))
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["row"], line["id"], line["source"], line["stage"]) for line in lines] == [
        (0, None, "web", "reading"),
        (1, "tiny-001", "web", "reading"),
        (2, None, "web", "reading"),
        (3, "tiny-003", "web", "extraction"),
        (5, "tiny-005", "books", "extraction"),
        (6, "tiny-006", "books", "extraction"),
    ]
    assert lines[1]["reason"] == "sample 'tiny-001': image is no picture"
    assert "cannot decode" in lines[0]["reason"] and "no region" in lines[3]["reason"]
    assert "empty" in lines[4]["reason"] and "not finite as float16" in lines[5]["reason"]
    assert manifest.num_rows == 4 and manifest.num_quarantined == 6 and manifest.num_source_rows == 10
    assert manifest.shards[0].rows == 0
    cache = FeatureCache(tmp_path)
    assert cache.source_row.tolist() == [4, 7, 8, 9]
    assert [cache[row]["id"] for row in range(4)] == ["tiny-004", "tiny-007", "tiny-008", "tiny-009"]
    assert not verify(tmp_path)
    with pytest.raises(CacheError, match="all 10 rows were unusable"):
        build(tmp_path / "none", Mixed(broken=tuple(range(10))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays: arrays.pop("image_codes"), "returned no image_codes"),
        (lambda arrays: arrays.update(region_boxes=np.zeros((1, 4))), r"region_boxes has shape \(1, 4\)"),
        (lambda arrays: arrays.update(region_classes=np.array([0])), "region_classes from 0 to 0"),
        (lambda arrays: arrays.update(region_scores=np.ones(3)), "numbers of regions differ"),
        (lambda arrays: arrays.update(image_codes=np.arange(3)), "3 image_codes, expected 4"),
    ],
)
def test_extractor_that_breaks_its_contract_is_an_error(tmp_path, change, message):
    class Wrong(TinyExtractor):
        def _one(self, triplet):
            arrays = super()._one(triplet)
            change(arrays)
            return arrays

    with pytest.raises(ValueError, match=message) as error:
        build(tmp_path, extractor=Wrong())
    assert "tiny-000" in str(error.value)


def test_other_fingerprint_is_refused_with_the_difference(tmp_path):
    other = {"source": {"seed": 1}, "encoders": {"dvae": "abc"}, "new": True}
    build(tmp_path / "done")
    with pytest.raises(FingerprintMismatch, match="source.seed: 0 -> 1") as error:
        FeatureCache(tmp_path / "done", other)
    assert "new: absent -> true" in str(error.value) and "dvae" not in str(error.value)
    with pytest.raises(FingerprintMismatch, match="fingerprint.source.seed: 0 -> 1"):
        build(tmp_path / "done", fingerprint=other)

    def fail(call):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        build(tmp_path / "cut", extractor=TinyExtractor(before=fail))
    with pytest.raises(FingerprintMismatch, match="examples_per_shard: 3 -> 4"):
        build(tmp_path / "cut", examples_per_shard=4)


def test_bfloat16_keeps_large_values(tmp_path):
    schema = Schema(**{**vars(SCHEMA), "feature_dtype": "bfloat16"})

    class Large(TinyExtractor):
        def _one(self, triplet):
            arrays = super()._one(triplet)
            return {k: v * 2.0**20 if k == "region_features" else v for k, v in arrays.items()}

    manifest = build(tmp_path, extractor=Large(), schema=schema)
    assert manifest.num_quarantined == 0
    value = FeatureCache(tmp_path)[0]["region_features"]
    assert value.dtype == ml_dtypes.bfloat16 and np.abs(value.astype(np.float32)).max() > 2.0**18


def test_tensorflow_datasets_reads_it_without_tensorflow(tmp_path):
    build(tmp_path)
    script = f"""
import sys
import tensorflow_datasets as tfds
import opt_jax.cache
source = tfds.builder_from_directory({str(tmp_path)!r}).as_data_source("train")
assert len(source) == 10
example = source[8]
assert example["id"] == b"tiny-008" and example["region_features"].shape == (1, 4), example
assert example["present"].tolist() == [True, True, True]
assert opt_jax.cache.FeatureCache({str(tmp_path)!r})[8]["id"] == "tiny-008"
assert "tensorflow" not in sys.modules and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ | {"PYTHONPATH": os.getcwd()})


def test_a_shard_is_read_and_extracted_in_pieces(tmp_path, monkeypatch):
    build(tmp_path / "whole", examples_per_shard=10)
    called = []

    class Watched(TinyExtractor):
        def extract(self, triplets):
            called.append(sum(x.nbytes for t in triplets for x in (t.image, t.audio) if x is not None))
            return super().extract(triplets)

    monkeypatch.setattr(shard, "PIECE", 150)
    build(tmp_path / "pieces", extractor=Watched(), examples_per_shard=10)
    assert len(called) > 3
    assert max(called) < 150 + 12 + 160  # a picture and the longest clip of a row beyond it
    assert contents(tmp_path / "pieces") == contents(tmp_path / "whole")


def test_data_that_is_gone_ends_the_build_and_not_its_rows(tmp_path):
    class Gone(TinySource):
        def __getitem__(self, row):
            if row == 4:
                raise SourceError("the disk is not there")
            return super().__getitem__(row)

    with pytest.raises(SourceError, match="the disk is not there"):
        build(tmp_path / "cache", source=Gone())
    manifest = build(tmp_path / "cache")
    assert manifest.num_rows == 10 and not manifest.num_quarantined
