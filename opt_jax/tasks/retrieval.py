"""Retrieval by the matching head, fine-tuned with a margin and hard negatives (OPT, table 3).

Of a batch, a query's negatives are other rows that the alignment embeddings take for its own: the model's
own hard negatives. A pair's parts are a query, of one or two modalities, and an item, of one.
Letters: B rows of the batch; R of them, the first, whose pairs are trained; K negatives on either side.
"""

import jax
import jax.numpy as jnp
import numpy as np

from opt_jax.evaluation.examples import Examples
from opt_jax.evaluation.large_pool import evaluate_large_pool
from opt_jax.evaluation.run import evaluate_retrieval, show_retrieval
from opt_jax.models.inputs import uncorrupted
from opt_jax.models.opt import lengths_of
from opt_jax.objectives.contrast import alignment_contrast
from opt_jax.objectives.masked import cross_entropy
from opt_jax.objectives.matching import NO_DONOR, image_for_text_audio_score, pair_score
from opt_jax.tasks import input_sets
from opt_jax.tasks.downstream import Downstream


class Retrieval(Downstream):
    """`config.inputs` are the triplets and pairs: 'T+I', 'T+A', and 'T+I+A' for text with speech to picture.

    Losses: the hinge of matching's probabilities, positive against negative, both ways; the contrast of
    pre-training, which orders what matching never sees; and the text's cross-entropy given the item alone,
    without which the text decoder would no longer fit the encoder, and its likelihood would rank worse.
    """

    def __init__(self, config, trained, loaders, sources):
        super().__init__(config, trained, loaders, sources)
        if not trained.config.model.num_alignment_layers:
            raise input_sets.InputSetError(
                "retrieval draws hard negatives by the alignment embeddings, which a model without alignment"
                " layers (config.model.num_alignment_layers) has not"
            )
        known = {
            "T+I": (("text",), "image"),
            "T+A": (("text",), "audio"),
            "T+I+A": (("text", "audio"), "image"),
        }
        names = [input_sets.lettered(keep) for keep in self.sets]
        if unknown := set(names) - set(known):
            raise input_sets.InputSetError(
                f"config.inputs {sorted(unknown)}: retrieval knows {', '.join(known)}"
            )
        self.pairs = [known[name] for name in names]
        weights = {"margin": 1.0, "contrastive": config.contrastive_weight, "text": config.text_weight}
        self.weights = {name: weight for name, weight in weights.items() if weight}

    def losses(self, params, batch, key, step, dropout):
        del step
        negative_key, *noise_keys = jax.random.split(key, 4)
        align_key, fuse_key, text_key = noise_keys if dropout else (None, None, None)
        lengths = lengths_of(batch)
        states, valid = self.apply(params, "align", uncorrupted(batch), key=align_key)
        units = self.apply(params, "embeddings", states, valid, lengths)
        out = {}
        if "contrastive" in self.weights:
            ordered = [units[name] for name in input_sets.NAMES]
            temperature = self.apply(params, "temperature")
            out["contrastive"] = alignment_contrast(
                ordered, batch["present"], batch["caption_key"], temperature
            )
        # Many rows to find hard negatives among cost the alignment layers only; the fusion sees pairs.
        own = jnp.arange(min(self.config.anchors, len(batch["present"])))
        margin, count = 0.0, 0.0
        for number, (queries, item) in enumerate(self.pairs):
            there = self.present(batch, (*queries, item))
            other = batch["caption_key"][own][:, None] != batch["caption_key"]
            usable = there[own][:, None] & there & other
            asks, answers = sum(units[name] for name in queries), units[item]
            similar = jax.lax.stop_gradient(jnp.stack([asks[own] @ answers.T, answers[own] @ asks.T]))
            pair_keys = jax.random.split(jax.random.fold_in(negative_key, number))
            others = [self.negatives(*each, usable).T for each in zip(pair_keys, similar, strict=True)]
            items, strangers = others  # [K, R] each: wrong items, and queries of others
            same = jnp.broadcast_to(own, items.shape)
            chosen = jnp.concatenate([own[None], same, strangers]), jnp.concatenate([own[None], items, same])
            sample, seen = self.composed(
                states, valid, lengths, {**dict.fromkeys(queries, chosen[0].ravel()), item: chosen[1].ravel()}
            )
            shown = shown_lengths(lengths, (*queries, item))
            fused = self.apply(params, "fuse", sample, seen, shown, key=folded(fuse_key, number))
            logits = self.apply(params, "matching_logits", fused).reshape(*chosen[0].shape, 5)
            if len(queries) > 1:
                score = image_for_text_audio_score(logits)
            else:
                score = pair_score(logits, tuple(sorted((*queries, item), key=input_sets.NAMES.index)))
            right, wrong = jnp.split(jax.nn.sigmoid(score), [1])
            allowed = jnp.take_along_axis(usable, jnp.concatenate(others).T, 1).T
            margin += (jax.nn.relu(self.config.margin + wrong - right) * allowed).sum()
            count += allowed.sum()
        out["margin"] = (margin, count.astype(jnp.float32))
        if "text" in self.weights:
            items = sorted({item for _, item in self.pairs})
            parts = [
                self.written(params, batch, states, valid, own, item, folded(text_key, number))
                for number, item in enumerate(items)
            ]
            out["text"] = tuple(map(sum, zip(*parts, strict=True)))
        return out

    def written(self, params, batch, states, valid, rows, source: str, key):
        """(sum, count) of the cross-entropy of the texts of `rows` [R], given picture or recording alone."""
        keys, lengths = (None, None) if key is None else jax.random.split(key), lengths_of(batch)
        sample, seen = self.composed(states, valid, lengths, {source: rows})
        memory = self.apply(params, "fuse", sample, seen, shown_lengths(lengths, (source,)), key=keys[0])
        words, memory_kv = batch["text_ids"][rows, 1:], self.apply(params, "text_memory", memory)
        logits = self.apply(params, "text_logits", words, memory_kv, seen, key=keys[1])
        weight = batch["text_valid"][rows, 1:] & self.present(batch, ("text", source))[rows, None]
        return cross_entropy(logits, words, weight)

    @staticmethod
    def present(batch, names) -> jax.Array:
        """Rows [B] that have all these modalities."""
        return jnp.stack([batch["present"][:, input_sets.NAMES.index(name)] for name in names]).all(0)

    def negatives(self, key, similarity, usable):
        """K of the batch's rows for each of R, of those it may have: [R, K]; `similarity`, `usable` [R, B].

        They are drawn without repetition by their similarity, or for a share of the R rows evenly
        (`hard_fraction`). Where fewer than K are usable others stand in their place.
        """
        hard_key, noise_key = jax.random.split(key)
        hard = jax.random.bernoulli(hard_key, self.config.hard_fraction, (len(similarity), 1))
        logits = jnp.where(hard, similarity / self.config.hard_temperature, 0.0)
        noise = jax.random.gumbel(noise_key, logits.shape)
        number = min(self.config.negatives, similarity.shape[1])
        return jax.lax.top_k(jnp.where(usable, logits + noise, NO_DONOR), number)[1]

    @staticmethod
    def composed(states, valid, lengths, rows: dict):
        """(states, seen) [N, S', ...]: the modalities of `rows`, from the rows [N] of the batch named there.

        [CLS] knows no modality yet, and is that of the first. Of other modalities there are no positions.
        """
        first, starts = next(iter(rows.values())), np.cumsum([0, *lengths])
        parts, seen = [states[first, :1]], [valid[first, :1]]
        for m, name in enumerate(input_sets.NAMES):
            if name in rows:
                part = slice(starts[m] + (m == 0), starts[m + 1])
                parts.append(states[rows[name], part])
                seen.append(valid[rows[name], part])
        return jnp.concatenate(parts, 1), jnp.concatenate(seen, 1)

    def evaluate(self, params, directory):
        """Recall by every scorer; of a pool that is scored whole, what some queries find is shown."""

        def say(what):
            print(f"{self.config.task}: {what}", flush=True)

        settings, model = self.config.evaluation, self.model(params)
        if settings.pool_size > settings.exhaustive:
            return evaluate_large_pool(settings, model, self.loaders, say)
        results, best, weights = evaluate_retrieval(settings, model, self.loaders, say)
        examples = Examples(directory, self.sources["test"])
        show_retrieval(examples, self.loaders["test"], best[0], weights, settings.examples)
        examples.write()
        return results


def shown_lengths(lengths: tuple[int, int, int], names) -> tuple[int, int, int]:
    """(T, V, A) of samples that have the modalities `names` only, and [CLS]."""
    shown = zip(input_sets.NAMES, lengths, strict=True)
    return tuple(length if name in names else int(name == "text") for name, length in shown)


def folded(key, number: int):
    """A key of its own for each number; None, which is no dropout, stays None."""
    return None if key is None else jax.random.fold_in(key, number)
