"""Answering questions about pictures (OPT, table 6): the question is written or spoken, the answer is chosen
among those of the training set, and also written by the text decoder.

Letters: C answers, U word pieces of the longest with its [SEP].
"""

import re

import jax
import jax.numpy as jnp
import numpy as np

from opt_jax.data import vqa
from opt_jax.data.question_results import write_answers
from opt_jax.evaluation.examples import Examples
from opt_jax.evaluation.question_answering import answer_accuracies, vqa_accuracy
from opt_jax.evaluation.run import longest
from opt_jax.models.generation import generate_text
from opt_jax.models.opt import lengths_of
from opt_jax.objectives.masked import cross_entropy
from opt_jax.pipeline import cached_source
from opt_jax.tasks import input_sets
from opt_jax.tasks.classification import Classification, class_logits
from opt_jax.tasks.downstream import IMAGE

PEOPLE = 10  # who all say the same: what VQA v2 has for an answer that nobody doubts


def scored(classes: jax.Array, scores: jax.Array, count: int) -> jax.Array:
    """[B, count]: the scores [B, P] of each row's classes [B, P], 0 of all others.

    Where a score is 0 the class is any.
    """
    rows = jnp.arange(len(classes))[:, None]
    return jnp.zeros((len(classes), count), scores.dtype).at[rows, classes].max(scores)


class QuestionAnswering(Classification):
    """Captions are the questions, labels the answers: 'T+I' reads the question, 'I+A' hears it.

    'T' and 'A' show what the question alone gives away. In a source of kind vqa people's answers count, in
    training by their `soft_scores`. Elsewhere the label is the one right answer.

    Attributes:
      targets: (classes int32 [N, P], scores float32 [N, P]) by row of the training cache, see `vqa.VQA`; None
        where the labels are all there is.
    """

    weights = {"classes": 1.0, "text": 1.0}

    def __init__(self, config, trained, loaders, sources):
        listed = vqa.behind(sources["test"])
        self.answers_there = listed is None or listed[0].answered
        super().__init__(config, trained, loaders, sources)
        self.draws = [config.picture_weight if keep[IMAGE] else 1.0 for keep in self.sets]
        self.answers_known = list(loaders["train"].cache.class_names)
        pieces = [trained.tokenizer.encode(answer)[1:] for answer in self.answers_known]  # without [CLS]
        positions = trained.config.model.max_text_positions
        pieces = [ids[: positions - 1] + ids[-1:] for ids in pieces]  # one that is cut keeps its [SEP]
        length = max(map(len, pieces))
        self.pieces = np.array([ids + [trained.tokenizer.pad_id] * (length - len(ids)) for ids in pieces])
        self.lengths = np.array([len(ids) for ids in pieces])
        self.targets = None
        if found := vqa.behind(cached_source(trained.config, "train", sources["train"])):
            places = found[1][loaders["train"].cache.source_row]
            self.targets = found[0].answer_numbers[places], found[0].answer_scores[places]

    def prepare(self, key, batch):
        """As of every task; where people's answers count, `labels` [B, C] are their scores."""
        if self.targets is not None:
            # As constants of the program: 35 MB for VQA v2's training set.
            classes, scores = (jnp.asarray(table)[batch["index"]] for table in self.targets)
            batch = batch | {"labels": scored(classes, scores, len(self.answers_known))}
        return super().prepare(key, batch)

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
        batch = self.ready(batch)
        memory, valid = self.encode(params["opt"], batch)
        tokenizer = self.trained.tokenizer
        options = {"max_length": self.pieces.shape[1], "end_id": tokenizer.sep_id, "pad_id": tokenizer.pad_id}
        written, _ = generate_text(self.network, params["opt"], memory, valid, **options)
        return class_logits(params["classes"], memory, valid, lengths_of(batch)), written

    def before(self, directory):
        """Nothing: the pre-trained model was never asked."""
        return {}

    def evaluate(self, params, directory):
        """VQA accuracy of the answers chosen and written, also by type of question, and that of always giving
        the answer most frequent in training. A question without a type is of that of its first two words.

        Where people's answers count, `directory`/answers.json gets what is chosen from the first of the input
        sets. Questions whose pictures cannot be used, which the figures leave out, get the most frequent one.
        Where the answers are kept back (test2015) that file is all there is.
        """
        cache, found = self.loaders["test"].cache, vqa.behind(self.sources["test"])
        if found:
            rows, (listed, places) = self.rows("test", None), found
            questions = [listed.question(int(place)) for place in places[cache.source_row[rows]]]
            truths = [vqa.said_by_people(question) for question in questions]
            types = np.array([question.answer_type or "" for question in questions])
        else:
            rows = self.labelled("test", None)
            asked = [cache[int(row)] for row in rows]
            truths = [[self.answers_known[row["labels"][0]]] * PEOPLE for row in asked]
            types = np.array([" ".join(row["caption"].split()[:2]) for row in asked])
        usual = self.most_frequent()
        answers = [self.said(params, rows, keep) for keep in self.sets]
        results = self.accuracies(usual, answers, truths, types) if self.answers_there else {}
        if found:
            every = [question for place in places if (question := listed.question(int(place)))]
            chosen = {question.id: usual for question in every}
            chosen |= {question.id: text for question, text in zip(questions, answers[0][0], strict=True)}
            write_answers(directory / "answers.json", chosen, every)
        self.show(directory, rows, answers, truths)
        return results

    def accuracies(self, usual: str, answers, truths, types: np.ndarray) -> dict[str, float]:
        """Results for what `said` gave for each input set, `answers`, and for always saying `usual`; types:
        those of the questions, '' for none."""
        constant = vqa_accuracy([usual] * len(truths), truths)
        results = {"question_answering/most_frequent/accuracy": constant}
        for keep, both in zip(self.sets, answers, strict=True):
            for way, texts in zip(("accuracy", "accuracy_written"), both, strict=True):
                name = f"question_answering/{input_sets.lettered(keep)}/{way}"
                scores = answer_accuracies(texts, truths)
                results[name] = 100 * float(scores.mean())
                for kind in sorted(set(types) - {""}):
                    of_kind = "_".join([name, *re.findall(r"\w+", kind)])
                    results[of_kind] = 100 * float(scores[types == kind].mean())
        return results

    def show(self, directory, rows: np.ndarray, answers, truths) -> None:
        """Writes `evaluation.examples` of the rows, far apart, with what `said` gave for each input set."""
        examples, number = Examples(directory, self.sources["test"]), self.config.evaluation.examples
        asked_with = [name for name, used in zip(input_sets.NAMES, self.sets.any(0), strict=True) if used]
        for place in np.unique(np.linspace(0, len(rows) - 1, min(number, len(rows)), dtype=int)):
            said = {
                input_sets.lettered(keep): (chosen[place], written[place])
                for keep, (chosen, written) in zip(self.sets, answers, strict=True)
            }
            row = int(self.loaders["test"].cache.source_row[rows[place]])
            examples.question(row, said, list(dict.fromkeys(truths[place])), asked_with)
        examples.write()

    def said(self, params, rows: np.ndarray, keep: np.ndarray) -> tuple[list[str], list[str]]:
        """The answers chosen and those written to rows of the test split's cache, shown `keep` [3].

        A batch is dropped once it is answered: of VQA v2 not all would fit into memory.
        """
        loader, size = self.loaders["test"], min(self.config.evaluation.batch_size, max(len(rows), 1))
        chosen, written = [], []
        for batch in loader.evaluation_batches(rows, size, longest(self.loaders, {"test": rows})):
            logits, words = self.answers(params, [batch], keep)
            chosen += [self.answers_known[best] for best in logits.argmax(1)]
            written += [self.trained.tokenizer.decode([int(i) for i in ids]) for ids in words]
        return chosen, written

    def most_frequent(self) -> str:
        """The answer that has most scores in training, or that its first rows have most often."""
        if self.targets is not None:
            classes, scores = self.targets
            return self.answers_known[int(np.bincount(classes.ravel(), scores.ravel()).argmax())]
        counts = np.zeros(len(self.answers_known))
        for batch in self.batches("train", self.labelled("train", 2000)):
            counts += batch["labels"].sum(0)
        return self.answers_known[int(counts.argmax())]
