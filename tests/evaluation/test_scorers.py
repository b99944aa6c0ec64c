"""What the scorers compute in one go, against single forward passes put together by hand."""

import functools
import itertools
import re
import types

import jax
import numpy as np
import pytest

from opt_jax.evaluation import pretrained
from opt_jax.evaluation.large_pool import Pool
from opt_jax.evaluation.pretrained import clearly_best
from opt_jax.evaluation.scorers import Model
from opt_jax.models.inputs import Statistics, uncorrupted
from opt_jax.models.opt import OPT, Sizes
from opt_jax.objectives.matching import image_for_text_audio_score, pair_score
from opt_jax.partitioning import unbox

P, T, V, A, G = 4, 6, 3, 5, 4
SIZES = Sizes(
    vocab_size=17, region_size=4, audio_size=6, num_region_classes=4, num_codes=9, codes_per_image=G
)
DECODER = dict(num_layers=1, num_heads=2, mlp_size=16)
CONFIG = dict(
    hidden_size=8, num_layers=3, num_heads=2, mlp_size=16, dropout=0.0, pre_norm=True,
    layer_norm_epsilon=1e-12, num_alignment_layers=1, alignment_size=4, temperature_init=0.07,
    temperature_min=0.01, max_text_positions=T, max_audio_positions=A, frame_window=3, remat=False, unroll=1,
    dtype="float32", initializer_range=0.3, text_decoder=DECODER, image_decoder=DECODER,
)  # fmt: skip


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    valid = [np.arange(size) < rng.integers(2, size + 1, P)[:, None] for size in (T, V, A)]
    ids = np.where(valid[0], rng.integers(5, 17, (P, T)), 0)
    ids[:, 0] = 2  # [CLS]
    return {
        "text_ids": ids,
        "text_valid": valid[0],
        "region_features": rng.normal(size=(P, V, 4)).astype(np.float32),
        "region_boxes": rng.random((P, V, 7)).astype(np.float32),
        "region_valid": valid[1],
        "audio_features": rng.normal(size=(P, A, 6)).astype(np.float32),
        "audio_valid": valid[2],
        "present": np.ones((P, 3), bool),
        "caption_key": np.arange(P),
        "image_codes": rng.integers(0, 9, (P, G)),
    }


@pytest.fixture(scope="module")
def model(batch):
    network = OPT(CONFIG, SIZES)
    init = jax.jit(network.init)
    params = unbox(init(jax.random.key(0), uncorrupted(batch), batch["image_codes"])["params"])
    zero, one = np.zeros(1, np.float32), np.ones(1, np.float32)
    return Model(network, params, Statistics(zero, one, zero, one))


def assembled(batch, rows: dict) -> dict:
    """One row whose modalities, those named in `rows`, are taken from different rows of the batch."""
    fields = {"text": "text", "image": "region", "audio": "audio"}
    chosen = {}
    for name, field in fields.items():
        source = rows.get(name, 0)
        chosen |= {key: x[source : source + 1] for key, x in batch.items() if key.startswith(field)}
    return uncorrupted(chosen, tuple(name in rows for name in fields))


def apply(model, method, *args):
    return compiled(model, method)({"params": model.params}, *args)


@functools.cache
def compiled(model, method):
    options = {"xla_backend_optimization_level": 0}  # compiles in half the time
    return jax.jit(functools.partial(model.model.apply, method=method), compiler_options=options)


@pytest.mark.parametrize("source", ["image", "audio"])
def test_likelihood_is_that_of_each_text_for_each_query(model, batch, source):
    found = model.likelihood(batch, source)
    for i, j in itertools.product(range(P), range(P)):
        memory, valid = apply(model, "encode", assembled(batch, {source: i}))
        ids, counted = batch["text_ids"][j, 1:], batch["text_valid"][j, 1:]
        logits = apply(model, "text_logits", ids[None], apply(model, "text_memory", memory), valid)[0]
        log_probabilities = jax.nn.log_softmax(logits)[np.arange(T - 1), ids]
        np.testing.assert_allclose(found[i, j], (log_probabilities * counted).sum(), rtol=1e-4)


@pytest.mark.parametrize(
    ("queries", "item"),
    [(("text",), "image"), (("image",), "text"), (("audio",), "text"), (("text", "audio"), "image")],
)
def test_matching_puts_the_query_and_the_candidates_together(model, batch, queries, item):
    candidates = np.array([[1, 3], [0, 2], [2, 1], [3, 0]])
    found = model.matching(batch, queries, item, candidates)
    for query, number in itertools.product(range(P), range(2)):
        rows = dict.fromkeys(queries, query) | {item: candidates[query, number]}
        memory, _ = apply(model, "encode", assembled(batch, rows))
        logits = apply(model, "matching_logits", memory)
        if len(queries) == 2:
            expected = image_for_text_audio_score(logits)[0]
        else:
            expected = pair_score(logits, tuple(name for name in ("text", "image", "audio") if name in rows))[
                0
            ]
        np.testing.assert_allclose(found[query, number], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("queries", "item"),
    [(("text",), "image"), (("image",), "text"), (("audio",), "text"), (("text", "audio"), "image")],
)
def test_a_pool_in_parts_has_the_scores_of_one_batch(model, batch, queries, item):
    batch = batch | {"row_valid": np.ones(P, bool)}
    halves = [{name: x[part] for name, x in batch.items()} for part in (slice(0, 2), slice(2, 4))]
    pool, everyone = Pool(model, halves, P), np.tile(np.arange(P), (P, 1))
    pool.fill()
    found = pool.scores(queries, item, everyone, 3, "pairs")  # which four queries do not fill
    np.testing.assert_allclose(found["matching"], model.matching(batch, queries, item), rtol=1e-4, atol=1e-5)
    likelihood = model.likelihood(batch, queries[0] if item == "text" else item)
    wanted = likelihood if item == "text" else likelihood.T
    np.testing.assert_allclose(found["information"], wanted, rtol=1e-4)
    units = model.embeddings(batch)
    similarity = sum(units[name] for name in queries) @ units[item].T
    np.testing.assert_allclose(pool.similarity(queries, item), similarity, rtol=1e-4, atol=1e-6)


def test_the_prior_of_a_text_is_its_mean_probability(model, batch):
    halves = [{name: x[part] for name, x in batch.items()} for part in (slice(0, 2), slice(2, 4))]
    reference = halves[1] | {"row_valid": np.array([True, True])}
    pool = Pool(model, halves, P)
    pool.fill()
    found = pool.prior(reference, "image")
    np.testing.assert_allclose(found, np.log(np.exp(model.likelihood(batch, "image")[2:]).mean(0)), rtol=1e-4)


def test_probe_features_are_cls_and_the_means_of_what_is_shown(model, batch):
    found = model.probe_features(batch, (True, False, True))
    for row in range(P):
        memory, valid = apply(model, "encode", assembled(batch, {"text": row, "audio": row}))
        memory, valid = np.asarray(memory[0]), np.asarray(valid[0])
        parts = [slice(1, T), slice(T + V, T + V + A)]
        means = [memory[part][valid[part]].mean(0) for part in parts]
        np.testing.assert_allclose(found[row], np.concatenate([memory[0], *means]), rtol=1e-4, atol=1e-5)


class Known:
    """Stands for a model with one good scorer in each direction; the others say the same of every pair."""

    class model:
        config = {"num_alignment_layers": 1}

    def likelihood(self, batch, source):
        # Text 0 is likely for every picture; only beside the other queries is it told apart.
        scores = np.full((P, P), -20.0)
        np.fill_diagonal(scores, -9.0)
        scores[:, 0] = -3.0
        scores[0, 0] = -2.0
        return scores if source == "image" else np.zeros((P, P))

    def embeddings(self, batch):
        return {"text": np.eye(P), "audio": np.eye(P), "image": np.zeros((P, P))}

    def matching(self, batch, queries, item, candidates=None):
        return np.zeros((P, P) if candidates is None else candidates.shape)


def test_weights_and_recall_follow_the_scorer_that_knows(batch):
    weights = pretrained.best_weights(Known(), [batch], rerank_top=2)
    assert weights["image_to_text"]["information"] > 0
    assert weights["text_to_audio"]["alignment"] == 1.0
    assert weights["text_audio_to_image"]["as_text"] == 1.0  # speech tells nothing here: the text ranks alone
    assert weights["text_to_image"].keys() == {"information", "matching"}  # the simplest, and not re-ranked
    assert all(chosen.get("matching", 0.0) == 0.0 for chosen in weights.values())
    others = [batch]
    results, best = pretrained.retrieval(Known(), [batch], weights, others, matching_pools=1, rerank_top=2)
    for direction in ("image_to_text", "text_to_image", "text_to_audio", "audio_to_text"):
        assert results[f"retrieval/{direction}/R@1"] == 100.0, direction
        assert best[0][direction].shape == (P, P)
    assert results["retrieval_information/image_to_text/R@1"] == 100.0
    assert results["retrieval_information_alone/image_to_text/R@1"] == 100.0
    assert results["retrieval_alignment/image_to_text/R@1"] == 0.0  # ties count against the model
    assert results["retrieval_matching/text_to_image/R@1"] == 0.0
    assert results["retrieval_information/audio_to_text/R@1"] == 0.0


class Speaking(Known):
    """Only the speech finds pictures."""

    def likelihood(self, batch, source):
        return np.zeros((P, P))

    def embeddings(self, batch):
        return {"text": np.zeros((P, P)), "audio": np.eye(P), "image": np.eye(P)}


def test_speech_that_finds_pictures_is_used_beside_the_text(batch):
    weights = pretrained.best_weights(Speaking(), [batch], rerank_top=2)
    assert weights["text_audio_to_image"]["alignment"] > 0
    options = {"matching_pools": 1, "rerank_top": 2}
    results, _ = pretrained.retrieval(Speaking(), [batch], weights, [], **options)
    assert results["retrieval/text_audio_to_image/R@1"] == 100.0
    assert results["retrieval_both/text_audio_to_image/R@1"] == 100.0
    assert results["retrieval/text_to_image/R@1"] == 0.0
    weights["text_audio_to_image"]["as_text"] = 1.0
    results, best = pretrained.retrieval(Speaking(), [batch], weights, [], **options)
    assert results["retrieval/text_audio_to_image/R@1"] == 0.0
    assert results["retrieval_both/text_audio_to_image/R@1"] == 100.0
    np.testing.assert_array_equal(best[0]["text_audio_to_image"], best[0]["text_to_image"])


class Matching(Known):
    """Matching finds the item of every query, were it not that all like item 0 best."""

    def matching(self, batch, queries, item, candidates=None):
        scores = np.eye(P) + 5.0 * (np.arange(P) == 0)
        return scores if candidates is None else np.take_along_axis(scores, candidates, 1)

    def text(self, batch, keep, **options):
        return batch["text_ids"]

    def probe_features(self, batch, keep):
        return batch["labels"]


def test_matching_of_all_pairs_holds_both_ways(batch):
    options = {"matching_pools": 1, "rerank_top": 0}
    weights = pretrained.best_weights(Matching(), [batch], rerank_top=0)
    results, _ = pretrained.retrieval(Matching(), [batch, batch], weights, [], **options)
    for direction in ("text_to_image", "text_to_audio", "text_audio_to_image"):
        assert results[f"retrieval_matching/{direction}/R@1"] == 25.0
    for direction in ("image_to_text", "audio_to_text"):
        assert results[f"retrieval_matching/{direction}/R@1"] == 100.0


def test_stages_tell_how_far_they_are(batch, capsys, monkeypatch):
    batch = batch | {"row_valid": np.ones(P, bool), "labels": np.eye(P)}
    model, pools = Matching(), [batch, batch]
    weights = pretrained.best_weights(model, pools, rerank_top=2)
    pretrained.retrieval(model, pools, weights, [], matching_pools=1, rerank_top=2)
    tokenizer = types.SimpleNamespace(sep_id=3, pad_id=0, decode=str)
    options = {"max_length": T, "beams": 1}
    assert len(pretrained.write_texts(model, pools, (False, True, True), tokenizer, **options)) == 2 * P
    monkeypatch.setattr(pretrained, "linear_probe", lambda train, labels, test, weight_decay: test)
    pretrained.probe(model, pools, [], [batch], ("text", "image"))
    told = [line for line in capsys.readouterr().err.splitlines() if "100%" in line]
    assert [re.search(r"(.*): +100%.* (\d+)/\d+ \[.*(it/s|s/it)\]", line).groups()[:2] for line in told] == [
        ("weights: pools", "2"),
        ("weights: directions", "5"),
        ("retrieval: pools", "2"),
        ("retrieval: all pairs", "3"),
        ("texts", "2"),
        ("probes", "3"),
    ]


def test_the_simple_ranking_stays_unless_another_is_clearly_better():
    def pools(*found):
        """One pool in which the queries named find their item."""
        return [np.where(np.eye(6), [[1.0 if query in found else -1.0] for query in range(6)], 0.0)]

    correct = [np.eye(6, dtype=bool)]
    assert clearly_best({"simple": pools(0, 1), "more": pools(0, 1, 2, 3)}, "simple", correct) == "more"
    gained = {"simple": pools(0, 1), "more": pools(0, 1, 2, 3)}  # 1/3, its standard error 0.19
    assert clearly_best(gained, "simple", correct, errors=2.0) == "simple"
    # Two found for one lost: a gain of 1/6, its standard error 0.28.
    assert clearly_best({"simple": pools(0, 1), "more": pools(0, 2, 3)}, "simple", correct) == "simple"
    assert clearly_best({"simple": pools(0, 1), "more": pools(0, 1)}, "simple", correct) == "simple"
