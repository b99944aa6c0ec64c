import dataclasses
import itertools
import time

import numpy as np
import pytest
from absl import flags
from tiny_cache import SCHEMA, TinyExtractor, TinySource

from opt_jax.cache import CacheError, FeatureCache, build_cache
from opt_jax.data.loader import Loader, LoaderConfig, collate, stack_frames
from opt_jax.data.plan import Batch

CONFIG = LoaderConfig(batch_size=4, buckets=((4, 2), (5, 3)), audio_stack=2, max_regions=2, seed=5)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cache")
    build_cache(
        TinySource(30), TinyExtractor(), directory, {}, split="train", schema=SCHEMA, examples_per_shard=8
    )
    return FeatureCache(directory)


def take(iterator, number):
    return list(itertools.islice(iterator, number))


def assert_equal(one, two):
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)


def test_collate_by_hand(cache):
    # Row 3: 1 word, 2 regions, 5 frames. Row 4: no image. Row 7: no audio. Row 9: no text. -1: filler.
    batch = collate(cache, Batch(np.array([3, 4, 7, 9, -1]), 5, 4), audio_stack=2, max_regions=3)
    assert {name: (x.shape, x.dtype.name) for name, x in batch.items()} == {
        "text_ids": ((5, 5), "int32"),
        "text_valid": ((5, 5), "bool"),
        "region_features": ((5, 3, 4), "float16"),
        "region_boxes": ((5, 3, 7), "float32"),
        "region_classes": ((5, 3), "int32"),
        "region_valid": ((5, 3), "bool"),
        "audio_features": ((5, 4, 6), "float16"),
        "audio_valid": ((5, 4), "bool"),
        "image_codes": ((5, 4), "int32"),
        "present": ((5, 3), "bool"),
        "caption_key": ((5,), "int32"),
        "labels": ((5, 3), "float32"),
        "index": ((5,), "int32"),
        "row_valid": ((5,), "bool"),
    }
    assert batch["text_ids"].tolist() == [
        [2, 10, 3, 0, 0],
        [2, 10, 11, 3, 0],
        [2, 10, 11, 3, 0],
        [2, 0, 0, 0, 0],
        [2, 0, 0, 0, 0],
    ]
    assert batch["text_valid"].sum(1).tolist() == [3, 4, 4, 1, 1]
    assert batch["region_valid"].tolist() == [
        [True, True, False],
        [False] * 3,
        [True, True, False],
        [True, True, False],
        [False] * 3,
    ]
    assert batch["audio_valid"].sum(1).tolist() == [3, 1, 0, 2, 0]
    assert batch["present"].tolist() == [
        [True, True, True],
        [True, False, True],
        [True, True, False],
        [False, True, True],
        [False] * 3,
    ]
    frames = cache[3]["audio_features"]
    np.testing.assert_array_equal(batch["audio_features"][0, 1], frames[2:4].reshape(-1))
    np.testing.assert_array_equal(batch["audio_features"][0, 2], np.tile(frames[4], 2))
    np.testing.assert_array_equal(batch["region_boxes"][0, :2], cache[3]["region_boxes"])
    assert batch["image_codes"].tolist() == [[3, 4, 5, 6], [0] * 4, [7, 8, 9, 10], [9, 10, 11, 12], [0] * 4]
    assert batch["labels"].argmax(1).tolist() == [0, 1, 1, 0, 0] and batch["labels"].sum(1).tolist() == [
        1,
        1,
        1,
        1,
        0,
    ]
    assert batch["index"].tolist() == [3, 4, 7, 9, -1]
    assert batch["row_valid"].tolist() == [True] * 4 + [False]
    for name, valid in [("text_ids", "text"), ("region_features", "region"), ("audio_features", "audio")]:
        assert not batch[name][1:][~batch[f"{valid}_valid"][1:]].any()
    assert batch["caption_key"][1] == batch["caption_key"][2] != batch["caption_key"][0]


def test_what_is_too_long_is_cut(cache):
    batch = collate(cache, Batch(np.array([3, 5]), 3, 1), audio_stack=2, max_regions=1)
    assert batch["text_ids"].tolist() == [[2, 10, 3], [2, 10, 3]]  # [SEP] stays
    np.testing.assert_array_equal(
        batch["region_features"][:, 0], [cache[row]["region_features"][0] for row in (3, 5)]
    )
    np.testing.assert_array_equal(batch["audio_features"][0, 0], cache[3]["audio_features"][:2].reshape(-1))
    figures = Loader(
        cache, dataclasses.replace(CONFIG, buckets=((3, 1),), max_regions=1, batch_size=30)
    ).report()
    assert figures["truncated_text"] == (cache.text_lengths > 3).sum() == 18
    assert figures["truncated_audio"] == (cache.frame_counts > 2).sum()
    assert figures["truncated_regions"] == (cache.region_counts > 1).sum() == 15
    assert figures["left_out"] == 0


def test_from_step_goes_on_where_another_left_off(cache):
    loader = Loader(cache, CONFIG)
    assert loader.steps_per_epoch == 7
    batches = take(loader.from_step(0), 18)
    for step in (1, 6, 7, 15):
        for one, two in zip(take(loader.from_step(step), 3), batches[step:], strict=False):
            assert_equal(one, two)
    seen = np.concatenate([batch["index"] for batch in batches[:7]])
    assert len(set(seen)) == 28
    assert {batch["text_ids"].shape for batch in batches} <= {(4, 4), (4, 5)}
    assert any((a["index"] != b["index"]).any() for a, b in zip(batches[:7], batches[7:14], strict=True))
    far = next(loader.from_step(7_000_000))
    assert far["index"].tolist() == loader.epoch(1_000_000)[0].indices.tolist()


def test_hosts_load_their_part_of_the_same_batch(cache):
    whole = take(Loader(cache, CONFIG).from_step(3), 5)
    parts = [take(Loader(cache, CONFIG, process_index=i, process_count=2).from_step(3), 5) for i in (0, 1)]
    for batch, *halves in zip(whole, *parts, strict=True):
        assert_equal(batch, {name: np.concatenate([half[name] for half in halves]) for name in batch})
    with pytest.raises(ValueError, match="3 hosts"):
        Loader(cache, CONFIG, process_index=0, process_count=3)


@pytest.mark.parametrize("threads", [0, 3])
def test_threads_do_not_change_the_batches(cache, threads):
    expected = take(Loader(cache, CONFIG).from_step(0), 4)
    for one, two in zip(
        take(Loader(cache, dataclasses.replace(CONFIG, threads=threads)).from_step(0), 4),
        expected,
        strict=True,
    ):
        assert_equal(one, two)


def test_some_rows_only(cache):
    rows = np.array([3, 5, 8, 11, 20])
    batches = take(Loader(cache, CONFIG, rows=rows).from_step(0), 6)
    assert set(np.concatenate([batch["index"] for batch in batches])) == set(rows)


def test_evaluation_batches_keep_the_order_and_fill_the_last(cache):
    batches = list(Loader(cache, CONFIG).evaluation_batches(range(20, 30), 4, (5, 3)))
    assert [batch["index"].tolist() for batch in batches] == [
        [20, 21, 22, 23],
        [24, 25, 26, 27],
        [28, 29, -1, -1],
    ]
    assert batches[2]["row_valid"].tolist() == [True, True, False, False]
    assert all(batch["text_ids"].shape == (4, 5) for batch in batches)
    assert batches[2]["text_ids"][2].tolist() == [2, 0, 0, 0, 0] and not batches[2]["present"][2:].any()
    assert list(Loader(cache, CONFIG).evaluation_batches([], 4, (5, 3))) == []


def test_missing_feature_is_an_error(cache, monkeypatch):
    import opt_jax.cache.reader as module

    def without_codes(record, schema):
        raise KeyError("the record lacks image_codes")

    monkeypatch.setattr(module, "deserialize", without_codes)
    with pytest.raises(CacheError, match="lacks image_codes") as error:
        next(Loader(cache, CONFIG).from_step(0))
    assert "tiny-" in str(error.value)


def test_stack_frames():
    frames = np.arange(10).reshape(5, 2)
    assert stack_frames(frames, 1).tolist() == frames.tolist()
    assert stack_frames(frames, 3).tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 8, 9]]


@pytest.mark.slow
def test_worker_processes_give_the_same_batches(cache):
    flags.FLAGS.mark_as_parsed()  # Grain hands them to its workers
    expected = take(Loader(cache, CONFIG).from_step(2), 4)
    iterator = Loader(cache, dataclasses.replace(CONFIG, workers=2)).from_step(2)
    for one, two in zip(take(iterator, 4), expected, strict=True):
        assert_equal(one, two)


@pytest.mark.slow
def test_rate(tmp_path):
    """50 batches of 32 a second of processor time, with features of the tiny variant's size."""
    schema = dataclasses.replace(SCHEMA, region_size=128, audio_size=128, num_codes=64)

    class Wide(TinyExtractor):
        def _one(self, triplet):
            return {
                "text_ids": np.arange(12),
                "region_features": np.ones((10, 128)),
                "region_boxes": np.ones((10, 7)),
                "region_classes": np.ones(10),
                "region_scores": np.ones(10),
                "audio_features": np.ones((200, 128)),
                "image_codes": np.ones(64),
            }

    class Complete(TinySource):
        def __getitem__(self, row):
            return dataclasses.replace(super().__getitem__(1), id=f"tiny-{row:03d}")

    build_cache(Complete(640), Wide(), tmp_path, {}, split="train", schema=schema)
    config = LoaderConfig(batch_size=32, buckets=((16, 50),), audio_stack=4, max_regions=12)
    iterator = Loader(FeatureCache(tmp_path), config).from_step(0)
    take(iterator, 10)
    start = time.process_time()
    take(iterator, 100)
    rate = 100 / (time.process_time() - start)
    print(f"{rate:.0f} batches a second")
    assert rate > 50
