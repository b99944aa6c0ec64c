import pickle

import numpy as np
import pytest
from tiny_cache import SCHEMA, TinyExtractor, TinySource

from opt_jax.cache import FeatureCache, build_cache
from opt_jax.data.loader import Loader, LoaderConfig
from opt_jax.data.mixture import Mixture, Part, row_weights
from opt_jax.data.plan import plan_epoch, report, steps_per_epoch, visits
from opt_jax.data.triplet import Source, SourceError, Triplet, UnusableSampleError

BUCKETS = ((6, 4), (8, 8), (10, 16))


class Words:
    """A source in memory: row i is (id, caption, labels)."""

    modalities = ("text",)

    def __init__(self, class_names, *rows):
        self.class_names, self.rows = class_names, rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.read(index)

    def read(self, index, image=True, audio=True):
        sample_id, caption, labels = self.rows[index]
        if caption is None:
            raise UnusableSampleError(sample_id, "caption", "is empty")
        return Triplet(id=sample_id, caption=caption, labels=labels)

    def caption(self, index):
        return self.rows[index][1]

    def rows_with(self, *parts):
        captions = [row[1] is not None and parts == ("text",) for row in self.rows]
        return np.flatnonzero(captions)

    def origin(self, index):
        return "words"

    def fingerprint(self):
        return {"source": "words", "rows": [row[0] for row in self.rows]}


@pytest.fixture
def mixture():
    one = Words(["dog", "cat"], ("a", "A dog.", (0,)), ("b", None, ()))
    two = Words(["cat", "ape"], ("a", "An ape and a cat.", (0, 1)), ("c", "A cat.", (0,)), ("d", "No.", ()))
    return Mixture([one, two], [1, 0.5])


def test_sources_after_one_another(mixture):
    assert isinstance(mixture, Source) and len(mixture) == 5
    assert mixture.class_names == ["ape", "cat", "dog"] and mixture.modalities == {"text"}
    assert [mixture.read(index).id for index in (0, 2, 3, 4)] == ["0:a", "1:a", "1:c", "1:d"]
    assert [mixture[index].labels for index in (0, 2, 3, 4)] == [(2,), (0, 1), (1,), ()]
    assert [mixture.caption(index) for index in (1, 3)] == [None, "A cat."]
    assert mixture.rows_with("text").tolist() == [0, 2, 3, 4] and not len(mixture.rows_with("audio"))
    assert Part(mixture, [4, 1, 3], "some").rows_with("text").tolist() == [0, 2]
    assert mixture.origin(1) == "0:words" and mixture.origin(4) == "1:words"
    with pytest.raises(UnusableSampleError, match="sample '0:b': caption is empty"):
        mixture[1]
    for index in (-1, 5):
        with pytest.raises(IndexError):
            mixture[index]
    assert [triplet.id for triplet in pickle.loads(pickle.dumps(Part(mixture, [0, 4], "train")))] == [
        "0:a",
        "1:d",
    ]


def test_fingerprints_tell_sources_and_rows_apart(mixture):
    found = mixture.fingerprint()
    assert found["count"] == 5 and [part["rows"] for part in found["sources"]] == [
        ["a", "b"],
        ["a", "c", "d"],
    ]
    assert Mixture(mixture.sources, [2, 2]).fingerprint() == found
    assert Mixture(mixture.sources[::-1], [1, 1]).fingerprint() != found
    parts = [Part(mixture, rows, "test").fingerprint() for rows in ([0, 2], [0, 3])]
    assert parts[0] != parts[1] and parts[0]["count"] == 2


def test_weights_of_rows(mixture):
    np.testing.assert_array_equal(row_weights(mixture), np.array([1, 1, 0.5, 0.5, 0.5], np.float32))
    assert row_weights(mixture).dtype == np.float32
    assert row_weights(Mixture(mixture.sources, [1, 1])) is row_weights(mixture.sources[0]) is None
    with pytest.raises(SourceError, match="one weight a source, found 2 and 1"):
        Mixture(mixture.sources, [1])


def test_a_part_has_its_own_rows(mixture):
    part = Part(mixture, [4, 0], "train")
    assert [part[0].id, part[1].id, part.caption(1), part.origin(0)] == ["1:d", "0:a", "A dog.", "1:words"]
    with pytest.raises(IndexError):
        part[2]


def test_visits_by_hand():
    # Edges 0, 0.5, 1, 3, 3.25; points 0.6, 1.6, 2.6 (and 3.6, beyond), or 0.1, 1.1, 2.1, 3.1.
    weights = np.array([0.5, 0.5, 2, 0.25])
    assert visits(weights, 0.6).tolist() == [0, 1, 2, 0]
    assert visits(weights, 0.1).tolist() == [1, 0, 2, 1]
    assert visits(np.ones(5), 0.999).tolist() == [1] * 5


def rows(number=103):
    random = np.random.default_rng(0)
    text, audio = random.integers(3, 12, number), random.integers(1, 20, number)
    return text, audio, random.random((number, 3)) < 0.8


def test_rows_are_visited_as_often_as_their_weight_says():
    weights = np.repeat([1, 2, 0.5, 0.1], [40, 20, 30, 13]).astype(np.float32)  # 96.3 visits
    assert steps_per_epoch(103, 8, weights) == 12
    seen = np.zeros((400, 103), int)
    for epoch in range(400):
        batches = plan_epoch(7, epoch, *rows(), 8, BUCKETS, weights)
        assert len(batches) == 12 and all(len(batch.indices) == 8 for batch in batches)
        seen[epoch] = np.bincount(np.concatenate([batch.indices for batch in batches]), minlength=103)
    assert (seen <= np.ceil(weights)).all()  # at most rounded up, what is left out aside
    np.testing.assert_allclose(seen.mean(0), weights, atol=0.1)
    groups = [seen[:, weights == weight].mean() for weight in np.unique(weights)]
    np.testing.assert_allclose(groups, np.unique(weights), rtol=0.02)
    assert len({tuple(row) for row in seen[:, 60:]}) > 300  # other rows every epoch


def test_a_plan_with_weights_is_a_function_of_seed_and_epoch():
    weights = np.full(103, 1.5)
    one, two, other = (plan_epoch(3, e, *rows(), 8, BUCKETS, weights) for e in (1, 1, 2))
    assert [batch.indices.tolist() for batch in one] == [batch.indices.tolist() for batch in two]
    assert [batch.indices.tolist() for batch in one] != [batch.indices.tolist() for batch in other]
    assert len(one) == 154 // 8 and report(one, *rows())["batches"] == 19


def test_sums_that_are_whole_fill_their_batches():
    for number in (10, 30, 70):  # 0.1 is no binary fraction: sums in another order differ in the last bits
        weights = np.full(number, np.float32(0.1))
        for epoch in range(50):
            assert len(plan_epoch(0, epoch, *rows(number), 1, BUCKETS, weights)) == number // 10
    with pytest.raises(ValueError, match="1 rows do not fill one batch of 2"):
        steps_per_epoch(10, 2, np.full(10, 0.1))


def test_the_loader_follows_weights(tmp_path):
    build_cache(TinySource(30), TinyExtractor(), tmp_path, {}, split="train", schema=SCHEMA)
    cache = FeatureCache(tmp_path)
    config = LoaderConfig(batch_size=4, buckets=((4, 2), (5, 3)), audio_stack=2, max_regions=2, seed=5)
    weights = np.where(np.arange(30) < 10, 2, 0.5)
    loader = Loader(cache, config, weights=weights)
    assert loader.steps_per_epoch == 7 and loader.report()["left_out"] > 0
    batches = loader.from_step(0)
    seen = np.concatenate([next(batches)["index"] for _ in range(7 * 20)])
    counts = np.bincount(seen, minlength=30) / 20
    assert counts[:10].mean() == pytest.approx(2 * 28 / 30, rel=0.05)  # 2 of 30 visits are left out
    assert counts[10:].mean() == pytest.approx(0.5 * 28 / 30, rel=0.2)
    later = loader.from_step(11)
    np.testing.assert_array_equal(next(later)["index"], seen[44:48])
    some = Loader(cache, config, rows=np.arange(5, 15), weights=weights)
    assert some.steps_per_epoch == 3 and set(next(some.from_step(0))["index"]) <= set(range(5, 15))
    plain, ones = Loader(cache, config), Loader(cache, config, weights=np.ones(30))
    assert plain.steps_per_epoch == ones.steps_per_epoch
    for wrong in (np.ones(29), np.zeros(30), np.full(30, np.nan)):
        with pytest.raises(ValueError, match="weights"):
            Loader(cache, config, weights=wrong)
