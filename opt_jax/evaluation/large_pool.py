"""Retrieval in a pool of thousands, where not every pair can be scored.

Alignment, whose cost grows with the pool and not with its square, puts the likeliest items on a short list
for each query. The text decoder and the matching head score the pairs on the lists, some queries at a time.

Letters: N triplets of the pool, k items on a short list, q queries in a chunk; S positions, D width.
"""

import time
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np

from opt_jax.data.loader import Loader
from opt_jax.evaluation import pretrained
from opt_jax.evaluation.retrieval import combine, equal_captions, recall_at_k, rerank, top_k
from opt_jax.evaluation.run import available_modalities, complete_rows, describe, longest
from opt_jax.evaluation.scorers import Model
from opt_jax.metrics_log import progress
from opt_jax.models.opt import lengths_of


def evaluate_large_pool(
    settings, model: Model, loaders: Mapping[str, Loader], say: Callable[[str], None]
) -> dict:
    """Recall in one pool of the test split; weights of the scorers are chosen on validation.

    Args:
      settings: pool_size, validation_pools and batch_size (of the pools on validation), rerank_top,
        shortlist (k), chunk (q).
    Returns: results under the names of `opt_jax.evaluation.pretrained.retrieval`; and
      `retrieval/DIRECTION/shortlisted`, percent of the queries whose list holds a right item.
    """
    test, validation = loaders["test"], loaders["validation"]
    available = available_modalities(test.cache)
    rows, held_out = (complete_rows(loader.cache, available) for loader in (test, validation))
    rows = rows[: settings.pool_size]
    split = "validation" if len(held_out) else "test"  # where there is none, the first rows stand in for it
    held_out = held_out if len(held_out) else rows[: settings.batch_size]
    lengths = longest(loaders, {split: held_out} | {"test": rows})
    size = min(settings.batch_size, len(held_out))
    held_out = held_out[: settings.validation_pools * size]
    others = list(loaders[split].evaluation_batches(held_out, size, lengths))
    wanted, number = pretrained.directions(available), min(settings.shortlist, len(rows))
    pool = Pool(model, test.evaluation_batches(rows, size, lengths), len(rows))
    minutes = predicted_seconds(settings, pool, others, available, number) / 60
    pairs = len(wanted) * len(rows) * number
    say(f"a pool of {len(rows)}, {pairs} pairs on its short lists: in all about {minutes:.1f} minutes")
    say(f"weights of the scorers, on the {split} split, in {len(others)} pools of {size}")
    weights = pretrained.best_weights(model, others, settings.rerank_top, available)

    pool.fill()
    gibibytes = pool.states.nbytes / 2**30
    say(f"what the alignment layers give for the pool takes {gibibytes:.2f} GiB")
    items = {name: top_k(pool.similarity(*pair), number) for name, pair in wanted.items()}
    priors = {name: pool.prior(others[0], name) for name in ("image", "audio") if name in available}
    results, ranked, correct = {}, {}, equal_captions(pool.keys, pool.keys)
    for direction, (queries, item) in wanted.items():
        similarity, listed = pool.similarity(queries, item), items[direction]
        found = pool.scores(queries, item, listed, settings.chunk, direction)
        if item == "text":
            found["information"] = found["information"] - priors[queries[0]][listed]
        found["alignment"] = np.take_along_axis(similarity, listed, 1)
        if len(queries) > 1:
            found["text_alignment"] = np.take_along_axis(pool.similarity(("text",), item), listed, 1)
        chosen = dict(weights[direction])
        matching, as_text = chosen.pop("matching", 0.0), chosen.pop("as_text", 0.0)
        total = combine([found[name] for name in chosen], list(chosen.values()))
        total = combine([total, found["matching"]], [1.0, matching])
        own = rerank(similarity, listed, total)
        ranked[direction] = ranked["text_to_image"] if as_text else own
        scored = {"": ranked[direction], "_alignment": similarity}
        if len(queries) > 1:
            scored["_both"] = own
        for name in ("information", "matching"):
            scored[f"_{name}"] = rerank(similarity, listed, found[name])
        for scorer, matrix in scored.items():
            for key, value in recall_at_k(matrix, correct).items():
                results[f"retrieval{scorer}/{direction}/{key}"] = value
        on_list = np.take_along_axis(correct, listed, 1).any(1)
        results[f"retrieval/{direction}/shortlisted"] = 100 * float(on_list.mean())
    results |= {"retrieval/pool": len(rows), "retrieval/shortlist": number}
    described = describe(weights, settings.rerank_top, split == "validation")
    return results | {"retrieval/description": f"{described}; of the {number} that alignment likes best"}


def predicted_seconds(settings, pool, others, available, number: int) -> float:
    """How long all of it will take, from one run, compiled, of each part: the alignment of the pool, how
    likely its texts are (`Pool.prior`), the weights on the batches `others`, the pairs on lists of `number`
    items."""
    batch, model, queries = others[0], pool.model, len(pool.keys)
    size = len(batch["present"])
    batches, chunks = -(-queries // size), -(-queries // settings.chunk)
    seconds = batches * timed(model.aligned, batch)
    for source in ("image", "audio"):
        if source in available:
            seconds += (batches + len(others)) * timed(model.likelihood, batch, source)
    for pair in pretrained.directions(available).values():
        if settings.rerank_top:
            tops = np.zeros((size, min(settings.rerank_top, size)), np.int64)
            seconds += len(others) * timed(model.matching, batch, *pair, tops)
        listed = np.zeros((queries, number), np.int64)
        seconds += chunks * timed(pool.chunk, *pair, listed, 0, settings.chunk)
    return seconds


def timed(function: Callable, *arguments) -> float:
    """Seconds of a call after one that compiles."""
    function(*arguments)
    start = time.monotonic()
    function(*arguments)
    return time.monotonic() - start


class Pool:
    """What the alignment layers give for all triplets of a pool, and the scores of pairs of it.

    Attributes: states [N, S, D], valid [N, S]; units {name: [N, E]}; alone [D], see `Model.aligned`.
      lengths: (T, V, A). texts: (ids, weight) [N, T - 1], without [CLS]. keys [N]: of the captions.
    """

    def __init__(self, model: Model, batches, size: int):
        """`batches`: of the loader, all of one shape, together `size` rows and fillers after them. The first
        is aligned here, so that chunks of pairs can be timed; `fill` aligns the others."""
        self.model, self.waiting, self.size = model, iter(batches), size
        self.text_batches, self.whole, self.filled = [], {}, 0
        self._add(next(self.waiting))
        self._place()

    def fill(self) -> None:
        for batch in self.waiting:
            self._add(batch)
        self._place()

    def _add(self, batch) -> None:
        states, valid, units, self.alone = self.model.aligned(batch)
        self.lengths = lengths_of(batch)
        self.text_batches.append({name: batch[name] for name in ("text_ids", "text_valid")})
        found = {"states": states, "valid": valid, "keys": batch["caption_key"], **units}
        found |= {name: array[:, 1:] for name, array in self.text_batches[-1].items()}
        for name, array in found.items():
            if name not in self.whole:
                self.whole[name] = np.zeros((self.size, *array.shape[1:]), array.dtype)
            room = self.whole[name][self.filled :][: len(array)]
            room[:] = array[: len(room)]
        self.filled += len(states)

    def _place(self) -> None:
        self.states = self.valid = None  # so that there are never two of them
        # On the device once, and not with every chunk.
        self.states, self.valid = (jnp.asarray(self.whole[name]) for name in ("states", "valid"))
        self.units = {name: self.whole[name] for name in ("text", "image", "audio") if name in self.whole}
        self.keys = self.whole["keys"]
        self.texts = self.whole["text_ids"], self.whole["text_valid"]

    def similarity(self, queries: tuple[str, ...], item: str) -> np.ndarray:
        """Alignment [N, N]."""
        return sum(self.units[name] for name in queries) @ self.units[item].T

    def prior(self, reference, source: str) -> np.ndarray:
        """log of the mean probability [N] of the texts, over the pictures or recordings of a batch."""
        found = []
        for texts in self.text_batches:
            likelihood = self.model.likelihood(reference | texts, source)
            real = likelihood[np.asarray(reference["row_valid"])].astype(np.float64)
            found.append(np.logaddexp.reduce(real, axis=0) - np.log(len(real)))
        return np.concatenate(found)[: len(self.keys)]

    def chunk(self, queries, item: str, items: np.ndarray, start: int, size: int) -> dict[str, np.ndarray]:
        """Scores [q, k] of the queries from `start`, with their `items` [N, k]; see `scores`."""
        # The last chunk scores some queries twice, so that one program serves all.
        rows = np.minimum(np.arange(start, start + size), len(items) - 1)
        pairs = (rows, items[rows])
        arrays = (self.states, self.valid)
        matching = self.model.aligned_matching(*arrays, *pairs, queries, item, self.lengths)
        asks = "text" not in queries
        source = queries[0] if asks else item
        likelihood = self.model.aligned_likelihood(
            *arrays, self.alone, self.texts, *pairs, source, asks, self.lengths
        )
        return {"matching": matching, "information": likelihood}

    def scores(self, queries, item: str, items: np.ndarray, size: int, name: str) -> dict[str, np.ndarray]:
        """{'matching', 'information'} [N, k]: of each query with its `items` [N, k]; the latter is the log-
        likelihood of the text, whose prior is still to be taken off. `name` is shown while it runs."""
        starts = range(0, len(items), size)
        parts = [
            self.chunk(queries, item, items, start, size)
            for start in progress(starts, desc=name.replace("_", " "))
        ]
        return {key: np.concatenate([part[key] for part in parts])[: len(items)] for key in parts[0]}
