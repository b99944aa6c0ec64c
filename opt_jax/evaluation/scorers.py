"""Runs a pre-trained model for evaluation: embeddings, the three retrieval scorers, generation, features for
a probe.

One `Model` holds the parameters and the compiled functions. Batches are those of the loader
(opt_jax.data.loader); P is the number of items of a retrieval pool, one batch.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opt_jax.models.cross_encoder import masked_mean
from opt_jax.models.generation import generate_image_codes, generate_text
from opt_jax.models.inputs import Statistics, standardise, uncorrupted
from opt_jax.models.opt import OPT, lengths_of
from opt_jax.objectives.matching import image_for_text_audio_score, pair_score

Keep = tuple[bool, bool, bool]  # which of text, image and audio the model is shown
FIELDS = ("text", "region", "audio")
NAMES = ("text", "image", "audio")
NOTHING = (False, False, False)


class Model:
    """A pre-trained model ready to be asked. All results are numpy arrays."""

    def __init__(self, model: OPT, params: Any, statistics: Statistics):
        self.model, self.params, self.statistics = model, params, statistics
        self.standardise = functools.partial(standardise, statistics=statistics)
        self.compiled = {}

    def apply(self, params, method: str, *args, **kwargs):
        return self.model.apply({"params": params}, *args, method=method, **kwargs)

    def run(self, function, *args, **static):
        """`function(params, *args, **static)`, compiled once for each function, choice of static and
        shapes."""
        key = (function.__func__, tuple(sorted(static.items())))
        if key not in self.compiled:
            self.compiled[key] = jax.jit(functools.partial(function, **static))
        return jax.device_get(self.compiled[key](self.params, *args))

    # --- retrieval -----------------------------------------------------------------------------------------

    def embeddings(self, batch) -> dict[str, np.ndarray]:
        """Alignment embeddings {'text', 'image', 'audio'} [P, E] of unit length."""
        return self.run(self._embeddings, batch)

    def _embeddings(self, params, batch):
        states, valid = self.apply(params, "align", uncorrupted(self.standardise(batch)))
        return self.apply(params, "embeddings", states, valid, lengths_of(batch))

    def likelihood(self, batch, source: str) -> np.ndarray:
        """log P(text j | image or audio i) for all pairs of a pool: [P, P]; `source` is 'image' or
        'audio'."""
        keep = (False, source == "image", source == "audio")
        return self.run(self._likelihood, batch, keep=keep)

    def _likelihood(self, params, batch, keep: Keep):
        memory, valid = self.memory(params, batch, keep)
        memory_kv = self.apply(params, "text_memory", memory)
        ids, weight = batch["text_ids"][:, 1:], batch["text_valid"][:, 1:]

        def one(query):
            logits = self.apply(params, "text_logits", ids, memory_kv[:, query][:, None], valid[query][None])
            log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), ids[..., None], -1)[..., 0]
            return (log_probs * weight).sum(1)

        return jax.lax.map(one, jnp.arange(ids.shape[0]))

    def matching(self, batch, queries: tuple[str, ...], item: str, candidates=None) -> np.ndarray:
        """Matching scores of items for queries, [P, N].

        `queries` are the modalities taken from the query's row, `item` the one taken from the candidate's
        row. candidates [P, N] int names the rows to score; None scores all against all.
        """
        size = batch["present"].shape[0]
        candidates = np.tile(np.arange(size), (size, 1)) if candidates is None else candidates
        return self.run(self._matching, batch, candidates, queries=queries, item=item)

    def _matching(self, params, batch, candidates, queries, item):
        states, valid = self.apply(params, "align", uncorrupted(self.standardise(batch)))
        rows = jnp.arange(candidates.shape[0])
        options = {"queries": queries, "item": item, "lengths": lengths_of(batch)}
        return self._aligned_matching(params, states, valid, rows, candidates, **options)

    def _aligned_matching(self, params, states, valid, rows, candidates, *, queries, item, lengths):
        """[Q, N] for the queries in `rows` [Q] and their `candidates` [Q, N], both rows of what `align` gave
        for a batch with these lengths (T, V, A)."""
        starts = np.cumsum([0, *lengths])
        parts = {name: slice(starts[m] + (m == 0), starts[m + 1]) for m, name in enumerate(NAMES)}
        shown = [name for name in NAMES if name in (*queries, item)]
        kept = tuple(
            length if name in shown else int(name == "text")
            for name, length in zip(NAMES, lengths, strict=True)
        )

        def one(query, items):
            def fetch(x):
                rows = {name: x[items][:, parts[name]] for name in shown if name == item}
                for name in queries:
                    rows[name] = repeated(x[query, parts[name]], len(items))
                return jnp.concatenate(
                    [repeated(x[query, :1], len(items)), *(rows[name] for name in shown)], 1
                )

            memory = self.apply(params, "fuse", fetch(states), fetch(valid), kept)
            return self.apply(params, "matching_logits", memory)

        logits = jax.lax.map(lambda pair: one(*pair), (rows, candidates))
        if len(queries) == 2:
            return image_for_text_audio_score(logits)
        return pair_score(logits, tuple(sorted((*queries, item), key=NAMES.index)))

    # --- retrieval in parts, for pools that are too large for one batch ------------------------------------

    def aligned(self, batch) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray], np.ndarray]:
        """(states [P, S, D], valid [P, S]) of `OPT.align`, the embeddings of `embeddings`, and the state [D]
        of a [CLS] without text, with which a picture or a recording alone begins."""
        return self.run(self._aligned, batch)

    def _aligned(self, params, batch):
        batch = self.standardise(batch)
        states, valid = self.apply(params, "align", uncorrupted(batch))
        units = self.apply(params, "embeddings", states, valid, lengths_of(batch))
        nothing = shortened(uncorrupted(batch, NOTHING), NOTHING)
        return states, valid, units, self.apply(params, "align", nothing)[0][0, 0]

    def aligned_matching(self, states, valid, rows, candidates, queries, item, lengths) -> np.ndarray:
        """Matching scores [Q, N] of `candidates` [Q, N] for the queries in `rows` [Q], both rows of what
        `aligned` gave for batches of these lengths (T, V, A)."""
        options = {"queries": queries, "item": item, "lengths": lengths}
        return self.run(self._aligned_matching, states, valid, rows, candidates, **options)

    def aligned_likelihood(
        self, states, valid, alone, texts, rows, candidates, source: str, asks: bool, lengths
    ) -> np.ndarray:
        """log P(text | picture or recording) [Q, N] of the queries in `rows` [Q] with their `candidates`.

        Args:
          states, valid, alone: of `aligned`. texts: (ids, weight) [P, T - 1], without [CLS].
          source: 'image' or 'audio'. asks: whether it is the query and the text the item, or the reverse.
        """
        options = {"source": source, "asks": asks, "lengths": lengths}
        arrays = (states, valid, alone, texts, rows, candidates)
        return self.run(self._aligned_likelihood, *arrays, **options)

    def _aligned_likelihood(
        self, params, states, valid, alone, texts, rows, candidates, *, source, asks, lengths
    ):
        m = NAMES.index(source)
        part = slice(sum(lengths[:m]), sum(lengths[: m + 1]))
        kept = tuple(length if name == source else 0 for name, length in zip(NAMES, lengths, strict=True))

        def one(query, items):
            sources, written = (query[None], items) if asks else (items, query[None])
            begin = repeated(alone[None], len(sources))
            seen = jnp.concatenate([jnp.ones((len(sources), 1), bool), valid[sources][:, part]], 1)
            memory = jnp.concatenate([begin, states[sources][:, part]], 1)
            memory = self.apply(params, "fuse", memory, seen, (1, *kept[1:]))
            ids, weight = (jnp.broadcast_to(x[written], (len(items), x.shape[1])) for x in texts)
            logits = self.apply(params, "text_logits", ids, self.apply(params, "text_memory", memory), seen)
            log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), ids[..., None], -1)[..., 0]
            return (log_probs * weight).sum(1)

        return jax.lax.map(lambda pair: one(*pair), (rows, candidates))

    # --- generation and features ---------------------------------------------------------------------------

    def memory(self, params, batch, keep: Keep):
        """M [B, S', D] and valid of the modalities in `keep` only; absent ones have no positions at all."""
        return self.apply(params, "encode", shortened(uncorrupted(self.standardise(batch), keep), keep))

    def text(self, batch, keep: Keep, *, max_length: int, end_id: int, pad_id: int, beams: int) -> np.ndarray:
        """The text [B, max_length] that the model writes for the modalities in `keep`."""
        options = {"max_length": max_length, "end_id": end_id, "pad_id": pad_id, "beams": beams}
        return self.run(self._text, batch, keep=keep, **options)

    def _text(self, params, batch, keep, **options):
        return generate_text(self.model, params, *self.memory(params, batch, keep), **options)[0]

    def codes(self, batch, keep: Keep, seed: int, *, top_k: int, guidance: float = 0.0) -> np.ndarray:
        """Sampled image codes [B, G] for the modalities in `keep`; guidance: away from those for nothing."""
        options = {"keep": keep, "top_k": top_k, "guidance": guidance}
        return self.run(self._codes, batch, jax.random.key(seed), **options)

    def _codes(self, params, batch, key, keep, top_k, guidance):
        memory, valid = self.memory(params, batch, keep)
        if guidance:
            nothing = self.memory(params, batch, NOTHING)  # [CLS] alone
            more = memory.shape[1] - nothing[0].shape[1]
            memory = jnp.concatenate([memory, jnp.pad(nothing[0], ((0, 0), (0, more), (0, 0)))])
            valid = jnp.concatenate([valid, jnp.pad(nothing[1], ((0, 0), (0, more)))])
        options = {"top_k": top_k, "guidance": guidance}
        return generate_image_codes(self.model, params, memory, valid, key, **options)[0]

    def code_predictions(self, batch, keep: Keep) -> np.ndarray:
        """The most likely code [B, G] at each cell, given the true codes before it."""
        return self.run(self._code_predictions, batch, keep=keep)

    def _code_predictions(self, params, batch, keep):
        memory, valid = self.memory(params, batch, keep)
        memory_kv = self.apply(params, "image_memory", memory)
        return self.apply(params, "image_logits", batch["image_codes"], memory_kv, valid).argmax(-1)

    def probe_features(self, batch, keep: Keep) -> np.ndarray:
        """[B, D + D * number kept]: M at [CLS], and its mean over each modality that is kept."""
        return self.run(self._probe_features, batch, keep=keep)

    def _probe_features(self, params, batch, keep):
        memory, valid = self.memory(params, batch, keep)
        features, start = [memory[:, 0]], 1
        for m, field in enumerate(FIELDS):
            if keep[m]:
                length = batch[f"{field}_valid"].shape[1] - (m == 0)
                part = slice(start, start + length)
                features.append(masked_mean(memory[:, part], valid[:, part]))
                start += length
        return jnp.concatenate(features, axis=-1)


def shortened(inputs, keep: Keep):
    """The model's inputs without the positions of what `keep` leaves out, but for [CLS]."""
    for m, field in enumerate(FIELDS):
        if not keep[m]:
            inputs |= {name: x[:, : int(m == 0)] for name, x in inputs.items() if name.startswith(field)}
    return inputs


def repeated(x, number: int):
    """x [...] as [number, ...]."""
    return jnp.broadcast_to(x, (number, *x.shape))
