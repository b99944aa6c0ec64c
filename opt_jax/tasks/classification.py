"""Multi-label classification from any set of modalities (OPT, table 2), with the whole model fine-tuned.

What is compared with it, the linear probe, leaves the model as it is (`opt_jax.evaluation.classification`).
Letters: C classes, D width of the model.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from opt_jax.evaluation import pretrained
from opt_jax.evaluation.classification import chance_mean_average_precision, mean_average_precision
from opt_jax.evaluation.examples import Examples
from opt_jax.models.cross_encoder import masked_mean
from opt_jax.models.heads import wide
from opt_jax.models.layers import dense, dense_init
from opt_jax.models.opt import lengths_of
from opt_jax.tasks import input_sets
from opt_jax.tasks.downstream import Downstream


def class_logits(classes, memory, valid, lengths: tuple[int, int, int]) -> jax.Array:
    """[B, C], at least in float32: linear in M at [CLS] and in M's mean over each modality (zeros for one not
    shown).

    Args:
      classes: {"kernel": [4 D, C], "bias": [C]}. memory, valid: M [B, S, D], and bool [B, S].
      lengths: (T, V, A), which add up to S.
    """
    parts, start = [memory[:, 0].astype(jnp.promote_types(memory.dtype, jnp.float32))], 0
    for m, length in enumerate(lengths):
        part = slice(start + (m == 0), start + length)
        parts.append(masked_mean(memory[:, part], valid[:, part]))
        start += length
    return wide(dense(classes, jnp.concatenate(parts, -1)))


class Classification(Downstream):
    """The whole model, and a linear classifier, `class_logits`, on what it makes of a row.

    Parameters: {"opt": those of the model, "classes": {"kernel": [4 D, C], "bias": [C]}}.
    """

    weights = {"classes": 1.0}
    answers_there = True  # the test split has what the answers are compared with

    def __init__(self, config, trained, loaders, sources):
        super().__init__(config, trained, loaders, sources)
        for split in ("train", "test") if self.answers_there else ("train",):
            if not loaders[split].cache.class_names or not len(self.labelled(split, 1)):
                raise input_sets.InputSetError(
                    f"the {split} split has no labels, which {config.task} needs; name data that have some:"
                    " config.data.kind=source"
                )

    def init(self, key, batch):
        width, classes = self.network.config["hidden_size"], batch["labels"].shape[1]
        head = dense_init(self.network.config["initializer_range"], (4 * width, classes), ("embed", "class"))
        head = head(jax.random.fold_in(key, 1))
        # A label in so many is likely from the start: else the first steps go into pushing all of them down.
        head["bias"] = jax.tree.map(lambda bias: bias - math.log(max(classes - 1, 1)), head["bias"])
        return {"opt": super().init(key, batch), "classes": head}

    def initial(self):
        return {"opt": self.trained.model.params}

    def losses(self, params, batch, key, step, dropout):
        del step
        memory, valid = self.encode(params["opt"], batch, key if dropout else None)
        return {"classes": self.class_loss(params, memory, valid, batch)}

    def class_loss(self, params, memory, valid, batch) -> tuple[jax.Array, jax.Array]:
        """(sum, count) over rows of the binary cross-entropy, summed over the classes."""
        logits = class_logits(params["classes"], memory, valid, lengths_of(batch))
        # A row without any label is one that nobody labelled.
        asked = (batch["keep"].any(1) & batch["labels"].any(1)).astype(jnp.float32)
        # softplus(x) - x * t is the cross-entropy of sigmoid(x) against t.
        each = (jax.nn.softplus(logits) - logits * batch["labels"]).sum(1)
        return (each * asked).sum(), asked.sum()

    def before(self, directory):
        """A linear probe of the pre-trained model, on `evaluation.probe_train` rows."""
        del directory
        shown = [name for name, used in zip(input_sets.NAMES, self.sets.any(0), strict=True) if used]
        limits = {"train": self.config.evaluation.probe_train, "validation": None, "test": None}
        batches = [self.batches(split, self.labelled(split, limit)) for split, limit in limits.items()]
        sets = [input_sets.lettered(keep) for keep in self.sets]
        return pretrained.probe(self.model(self.trained.model.params), *batches, shown, sets)

    def evaluate(self, params, directory):
        rows = self.labelled("test", None)
        batches = self.batches("test", rows)
        labels = np.concatenate([batch["labels"][batch["row_valid"]] for batch in batches])
        results = {"classification/chance/mAP": chance_mean_average_precision(labels)}
        number, logits = self.config.evaluation.examples, {}
        for keep in self.sets:
            name = input_sets.lettered(keep)
            (scores,) = self.answers(params, batches, keep)
            results[f"classification/{name}/mAP"] = mean_average_precision(scores, labels)["mAP"]
            logits[name] = scores[:number]
        self.show(directory, rows[:number], logits, labels[:number])
        return results

    def show(self, directory, rows: np.ndarray, logits: dict[str, np.ndarray], labels: np.ndarray) -> None:
        """Writes some rows [n] as examples: labels likelier than not, or the likeliest, by the input sets'
        logits [n, C], beside the true ones, `labels` [n, C]."""
        examples, cache = Examples(directory, self.sources["test"]), self.loaders["test"].cache
        shown = [name for name, used in zip(input_sets.NAMES, self.sets.any(0), strict=True) if used]
        for number, row in enumerate(rows):
            found = {}
            for name, of_all in logits.items():
                each = 1 / (1 + np.exp(-of_all[number].astype(np.float64)))
                ranked = np.argsort(-each)[: max(1, int((each > 0.5).sum()))]
                found[name] = {cache.class_names[i]: round(float(each[i]), 3) for i in ranked}
            truths = [cache.class_names[i] for i in np.flatnonzero(labels[number])]
            examples.labels(int(cache.source_row[row]), found, truths, shown)
        examples.write()

    def labelled(self, split: str, limit: int | None) -> np.ndarray:
        """Rows of a split that have a label and all that is shown: all, or the first `limit` in `order`."""
        rows, cache = self.rows(split, None), self.loaders[split].cache
        found = []
        for row in rows if limit is None else self.order(rows):
            if len(found) == limit:
                break
            if len(cache[int(row)]["labels"]):
                found.append(row)
        return np.array(found, np.int64)

    def answers(self, params, batches, keep: np.ndarray) -> list[np.ndarray]:
        """What `answer` gives for the real rows [n, ...] of some batches, shown `keep` [3]."""
        found = []
        for batch in batches:
            real, shown = np.asarray(batch["row_valid"]), np.tile(keep, (len(batch["present"]), 1))
            found.append([np.asarray(x)[real] for x in self._answer(params, batch | {"keep": shown})])
        return [np.concatenate(parts) for parts in zip(*found, strict=True)]

    def answer(self, params, batch) -> tuple[jax.Array, ...]:
        """(logits [B, C],) of a batch with `keep`."""
        batch = self.ready(batch)
        memory, valid = self.encode(params["opt"], batch)
        return (class_logits(params["classes"], memory, valid, lengths_of(batch)),)

    @functools.cached_property
    def _answer(self):
        return jax.jit(self.answer)
