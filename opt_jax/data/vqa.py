"""VQA v2 as a source: the question is the caption, the answers of the training set are the classes.

    vqa:v2_OpenEnded_mscoco_{split}2014_questions.json,annotations=v2_mscoco_{split}2014_annotations.json,
        images=coco,validation=val,test=val

on one line. The files are those of visualqa.org/download.html and COCO's pictures. The answers about test2015
are kept back: the file that `annotations` names for it need not be there.
"""

import collections
import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from opt_jax.data.lines import Texts
from opt_jax.data.mixture import Mixture, Part
from opt_jax.data.questions import PICTURES, Question, read_vqa
from opt_jax.data.row import Row
from opt_jax.data.rows import RowSource
from opt_jax.data.triplet import Source, SourceError, UnusableSampleError
from opt_jax.evaluation.question_answering import normalise_answer, soft_scores

# For an answer that a person left blank: nothing is left of it once answers are made alike, so it agrees with
# no other, and those who gave one still count.
BLANK = "-"


class VQA(RowSource):
    """The questions of one split, in their order, each a row; after them what could not be read, unusable.

    A row's labels are those of its answers that the training set often has, as `normalise_answer` makes them
    alike. How much each of them counts is no part of a triplet: see `answer_scores`.

    Attributes, N rows, at most P known answers to a question:
      answer_numbers: int32 [N, P], classes; 0 beyond a row's last.
      answer_scores: float32 [N, P] in [0, 1], of these; 0 beyond a row's last.
      answered: False where the answers are kept back.

    Args:
      path: the questions. annotations: their answers. images: the folder of the pictures, or of train2014 and
        its like with these. answers: how many classes the training split makes, by `vocabulary`; of a list
        without splits, all of it. subset: see `read_vqa`.
    """

    image_subfolders = tuple(dict.fromkeys(PICTURES.values()))

    def __init__(self, path, annotations, images, answers=3129, subset=None, class_names=None):
        try:
            size = int(answers)
        except ValueError:
            size = 0
        if size < 1:
            raise SourceError(f"vqa:{path}: answers={answers}; expected a whole number above 0")
        self.answered = class_names is None or Path(annotations).is_file()
        questions, self._set_aside = read_vqa(path, annotations if self.answered else None, subset)
        if not self.answered and not questions[0].image.startswith("COCO_test2015_"):
            raise SourceError(f"vqa:{path}: there is no {annotations}, which only test2015 may lack")
        fields = ([q.id, q.image, q.question, q.answers, q.answer_type] for q in questions)
        self.path, self._questions = Path(path), Texts(json.dumps(each).encode() for each in fields)
        alike = functools.cache(normalise_answer)  # a hundred thousand different ones among millions
        given = [[alike(answer) for answer in question.answers] for question in questions]
        self._answers = vocabulary(given, size) if class_names is None else list(class_names)
        self.answer_numbers, self.answer_scores = self._tables(given)
        digest = _sha256(annotations) if self.answered else None
        identity = {"sha256": _sha256(path), "annotations_sha256": digest}
        super().__init__("vqa", {"image": images}, identity, self._answers)

    def _tables(self, given: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
        numbers = {answer: number for number, answer in enumerate(self._answers)}
        shape = len(self), max(1, *map(len, given))
        classes, scores = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        for row, answers in enumerate(given):
            known = {numbers[a]: score for a, score in soft_scores(answers).items() if a in numbers}
            classes[row, : len(known)] = list(known)
            scores[row, : len(known)] = list(known.values())
        used = max(1, int((scores > 0).sum(1).max()))
        return classes[:, :used].copy(), scores[:, :used].copy()

    def __len__(self) -> int:
        return len(self._questions) + len(self._set_aside)

    def question(self, index: int) -> Question | None:
        """What was asked in row `index`, with the answers as published; None for one that cannot be read."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {self.path}: there are {len(self)}")
        if index >= len(self._questions):
            return None
        key, image, sentence, answers, answer_type = json.loads(self._questions[index])
        return Question(key, image, sentence, tuple(answers), answer_type)

    def row(self, index: int) -> Row:
        question = self.question(index)
        if question is None:
            error = self._set_aside[index - len(self._questions)]
            raise UnusableSampleError(error.sample_id, error.part, error.reason)
        if self.answered and len(question.answers) < 2:  # the metric leaves out each of them in turn
            raise UnusableSampleError(str(question.id), "answers", "are those of one person, expected more")
        known = self.answer_numbers[index][self.answer_scores[index] > 0]
        labels, sentence = tuple(self._answers[number] for number in known), question.question.strip()
        return Row(str(question.id), question.image, sentence, labels=labels, references=(sentence,))


def vocabulary(given: Iterable[Sequence[str]], size: int) -> list[str]:
    """The `size` answers that were given to the most questions, these first, then in the order of letters.

    given: for each question all its answers, made alike; an empty one is none.
    """
    counts = collections.Counter(answer for answers in given for answer in set(answers) if answer)
    return sorted(counts, key=lambda answer: (-counts[answer], answer))[:size]


def said_by_people(question: Question) -> list[str]:
    """The answers to score against by `answer_accuracies`, which refuses blank ones."""
    return [answer if answer.strip() else BLANK for answer in question.answers]


def behind(source: Source) -> tuple[VQA, np.ndarray] | None:
    """The list of questions that a source, or each part of it, comes from, and each row's place there.

    Returns: (list, int [rows of the source]); None where a source has no such list.
    Raises SourceError for a mixture: its classes are others than those of the list.
    """
    rows = np.arange(len(source))
    while isinstance(source, Part):
        rows, source = source.rows[rows], source.source
    if isinstance(source, Mixture) and any(map(behind, source.sources)):
        raise SourceError("questions of kind vqa cannot be mixed with another source; name them alone")
    return (source, rows) if isinstance(source, VQA) else None


def _sha256(path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
