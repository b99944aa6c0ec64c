"""Answering questions about pictures (OPT, table 6): the question is written or spoken, the answer is chosen
among those of the training set, and also written by the text decoder.

Letters: C answers, U word pieces of the longest with its [SEP].
"""

import jax
import jax.numpy as jnp
import numpy as np

from opt_jax.evaluation.question_answering import vqa_accuracy
from opt_jax.models.generation import generate_text
from opt_jax.models.inputs import standardise
from opt_jax.models.opt import lengths_of
from opt_jax.objectives.masked import cross_entropy
from opt_jax.tasks import input_sets
from opt_jax.tasks.classification import Classification

PEOPLE = 10  # who all say the same: what VQA v2 has for an answer that nobody doubts


class QuestionAnswering(Classification):
    """Captions are the questions, labels the answers: 'T+I' reads the question, 'I+A' hears it.

    'T' and 'A' show what the question alone gives away.
    """

    weights = {"classes": 1.0, "text": 1.0}

    def __init__(self, config, trained, loaders, sources):
        super().__init__(config, trained, loaders, sources)
        self.answers_known = list(loaders["train"].cache.class_names)
        pieces = [trained.tokenizer.encode(answer)[1:] for answer in self.answers_known]  # without [CLS]
        length = max(map(len, pieces))
        self.pieces = np.array([ids + [trained.tokenizer.pad_id] * (length - len(ids)) for ids in pieces])
        self.lengths = np.array([len(ids) for ids in pieces])

    def losses(self, params, batch, key, step, dropout):
        """The choice's, and the label-smoothed cross-entropy of the answer's words."""
        del step
        keys = jax.random.split(key) if dropout else (None, None)
        memory, valid = self.encode(params["opt"], batch, keys[0])
        answer = batch["labels"].argmax(1)
        words = jnp.asarray(self.pieces)[answer]
        weight = jnp.arange(words.shape[1]) < jnp.asarray(self.lengths)[answer][:, None]
        weight &= batch["keep"].any(1, keepdims=True) & (batch["labels"].max(1, keepdims=True) > 0)
        memory_kv = self.apply(params["opt"], "text_memory", memory)
        logits = self.apply(params["opt"], "text_logits", words, memory_kv, valid, key=keys[1])
        return {
            "classes": self.class_loss(params, memory, valid, batch),
            "text": cross_entropy(logits, words, weight, self.config.label_smoothing),
        }

    def answer(self, params, batch):
        """(logits [B, C], word pieces [B, U]) of a batch with `keep`."""
        batch = standardise(batch, self.trained.model.statistics)
        memory, valid = self.encode(params["opt"], batch)
        tokenizer = self.trained.tokenizer
        options = {"max_length": self.pieces.shape[1], "end_id": tokenizer.sep_id, "pad_id": tokenizer.pad_id}
        written, _ = generate_text(self.network, params["opt"], memory, valid, **options)
        return self.logits(params, memory, valid, lengths_of(batch)), written

    def before(self, directory):
        """Nothing: the pre-trained model was never asked."""
        return {}

    def evaluate(self, params, directory):
        """VQA accuracy, and that of always giving the answer most frequent in training."""
        del directory
        cache = self.loaders["test"].cache
        rows = self.labelled("test", None)
        batches = self.batches("test", rows)
        truths = [[self.answers_known[cache[int(row)]["labels"][0]]] * PEOPLE for row in rows]
        constant = vqa_accuracy([self.most_frequent()] * len(rows), truths)
        results = {"question_answering/most_frequent/accuracy": constant}
        for keep in self.sets:
            logits, written = self.answers(params, batches, keep)
            chosen = [self.answers_known[best] for best in logits.argmax(1)]
            said = [self.trained.tokenizer.decode([int(i) for i in ids]) for ids in written]
            name = input_sets.lettered(keep)
            results[f"question_answering/{name}/accuracy"] = vqa_accuracy(chosen, truths)
            results[f"question_answering/{name}/accuracy_written"] = vqa_accuracy(said, truths)
        return results

    def most_frequent(self) -> str:
        """The answer that the first rows of the training set have most often."""
        counts = np.zeros(len(self.answers_known))
        for batch in self.batches("train", self.labelled("train", 2000)):
            counts += batch["labels"].sum(0)
        return self.answers_known[int(counts.argmax())]
