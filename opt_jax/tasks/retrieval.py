"""Retrieval by the matching head, fine-tuned with a margin and hard negatives (OPT, table 3).

Of a batch, each query's negatives are other rows that the alignment embeddings take for its own: the model's
own hard negatives. B rows; P, Q a pair's parts: a query of one or two modalities, and an item of one.
"""

import jax
import jax.numpy as jnp

from opt_jax.evaluation.large_pool import evaluate_large_pool
from opt_jax.evaluation.run import evaluate_retrieval
from opt_jax.models.inputs import uncorrupted
from opt_jax.models.opt import lengths_of
from opt_jax.objectives.contrast import alignment_contrast
from opt_jax.objectives.matching import NO_DONOR, image_for_text_audio_score, pair_score
from opt_jax.tasks import input_sets
from opt_jax.tasks.downstream import Downstream

PAIRS = {("text",): ("image", "audio"), ("text", "audio"): ("image",)}


class Retrieval(Downstream):
    """`config.inputs` are the triplets and pairs: 'T+I', 'T+A', and 'T+I+A' for text with speech to picture.

    Losses: the hinge of matching's probabilities, positive against negative, both ways; and the contrast of
    pre-training, which orders what matching never sees.
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
        self.weights = {"margin": 1.0} | (
            {"contrastive": config.contrastive_weight} if config.contrastive_weight else {}
        )

    def losses(self, params, batch, key, step, dropout):
        del step
        keys = jax.random.split(key, 3)
        lengths = lengths_of(batch)
        align_key, fuse_key = keys[:2] if dropout else (None, None)
        states, valid = self.apply(params, "align", uncorrupted(batch), key=align_key)
        units = self.apply(params, "embeddings", states, valid, lengths)
        out = {}
        if "contrastive" in self.weights:
            ordered = [units[name] for name in input_sets.NAMES]
            temperature = self.apply(params, "temperature")
            out["contrastive"] = alignment_contrast(
                ordered, batch["present"], batch["caption_key"], temperature
            )
        variants, scorers, allowed = [], [], []
        for number, (queries, item) in enumerate(self.pairs):
            there = jnp.stack([batch["present"][:, input_sets.NAMES.index(m)] for m in (*queries, item)]).all(
                0
            )
            usable = there[:, None] & there[None] & (batch["caption_key"][:, None] != batch["caption_key"])
            similarity = jax.lax.stop_gradient(sum(units[name] for name in queries) @ units[item].T)
            pair_keys = jax.random.split(jax.random.fold_in(keys[2], number))
            own = jnp.arange(len(there))
            others = self.negatives(pair_keys[0], similarity, usable)
            strangers = self.negatives(pair_keys[1], similarity.T, usable)
            variants += [
                self.composed(states, valid, lengths, {**dict.fromkeys(queries, query), item: answer})
                for query, answer in ((own, own), (own, others), (strangers, own))
            ]
            scorers.append((queries, item))
            allowed.append(usable.any(1))
        fused = self.apply(
            params,
            "fuse",
            jnp.concatenate([states for states, _ in variants]),
            jnp.concatenate([seen for _, seen in variants]),
            lengths,
            key=fuse_key,
        )
        logits = self.apply(params, "matching_logits", fused).reshape(
            len(scorers), 3, len(batch["present"]), 5
        )
        total, count = 0.0, 0.0
        for (queries, item), pair, rows in zip(scorers, logits, allowed, strict=True):
            if len(queries) > 1:
                score = image_for_text_audio_score(pair)
            else:
                score = pair_score(pair, tuple(sorted((*queries, item), key=input_sets.NAMES.index)))
            right, *wrong = jax.nn.sigmoid(score)
            hinges = sum(jax.nn.relu(self.config.margin + other - right) for other in wrong)
            total += (hinges * rows).sum()
            count += len(wrong) * rows.sum()
        return out | {"margin": (total, count.astype(jnp.float32))}

    def negatives(self, key, similarity, usable):
        """A row for each row [B], of those it may have: one of the likest, or any (`hard_fraction`)."""
        hard_key, noise_key = jax.random.split(key)
        hard = jax.random.bernoulli(hard_key, self.config.hard_fraction, (len(similarity), 1))
        logits = jnp.where(hard, similarity / self.config.hard_temperature, 0.0)
        noise = jax.random.gumbel(noise_key, logits.shape)
        return jnp.where(usable, logits + noise, NO_DONOR).argmax(1)

    @staticmethod
    def composed(states, valid, lengths, rows: dict):
        """(states, seen) [B, S, ...]: each modality of `rows` from the rows [B] named there, and no other.

        [CLS] is nobody's: every row keeps its own.
        """
        starts, parts, seen = [0, lengths[0], sum(lengths[:2])], [states[:, :1]], [valid[:, :1]]
        for m, name in enumerate(input_sets.NAMES):
            part = slice(starts[m] + (m == 0), starts[m] + lengths[m])
            if name in rows:
                parts.append(states[rows[name], part])
                seen.append(valid[rows[name], part])
            else:
                parts.append(states[:, part])
                seen.append(jnp.zeros_like(valid[:, part]))
        return jnp.concatenate(parts, 1), jnp.concatenate(seen, 1)

    def evaluate(self, params, directory):
        del directory

        def say(what):
            print(f"{self.config.task}: {what}", flush=True)

        settings, model = self.config.evaluation, self.model(params)
        if settings.pool_size > settings.exhaustive:
            return evaluate_large_pool(settings, model, self.loaders, say)
        return evaluate_retrieval(settings, model, self.loaders, say)[0]
