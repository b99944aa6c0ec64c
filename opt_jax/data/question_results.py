"""Answers to questions in the official results format of VQA (visualqa.org/evaluation):

[{"question_id": 262148000, "answer": "down"}, ...]
"""

import json
import os
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from opt_jax.data.questions import Question, is_number, is_text, read_document
from opt_jax.data.triplet import SourceError

NAMED = 5  # ids that an error names
UNKNOWN = "answers to questions that are not in the set"


def write_answers(path, answers: Mapping[int, str], questions: Iterable[Question]) -> None:
    """Writes `answers`, by question id, in the order of `questions`: whole or not at all.

    Raises ValueError for ids of no question, for questions without an answer, on which the official
    evaluation fails, and for answers that are no text.
    """
    path, ids = Path(path), [question.id for question in questions]
    known = set(ids)
    for told, wrong in (
        (UNKNOWN, [key for key in answers if key not in known]),
        ("questions without an answer", [key for key in ids if key not in answers]),
        ("answers that are no text", [key for key in ids if key in answers and not is_text(answers[key])]),
    ):
        if wrong:
            raise ValueError(f"{path} is not written: {listed(wrong, told)}")
    aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    aside.write_text(json.dumps([{"question_id": key, "answer": answers[key]} for key in ids]))
    os.replace(aside, path)


def read_answers(path, questions: Iterable[Question] | None = None) -> dict[int, str]:
    """Answers by question id, from official results; all are to `questions` where these are given.

    Raises SourceError.
    """
    path, answers = Path(path), {}
    content = read_document(path)
    if not isinstance(content, list):
        raise SourceError(f"{path} holds {type(content).__name__}, expected a list of results")
    for number, entry in enumerate(content):
        fields = entry if isinstance(entry, dict) else {}
        key, answer = fields.get("question_id"), fields.get("answer")
        if not is_number(key) or not is_text(answer) or key in answers:
            expected = "a question_id that no earlier row has, a whole number, and an answer, text"
            raise SourceError(f"{path}, row {number} is {reprlib.repr(entry)}, expected {expected}")
        answers[key] = answer
    known = answers if questions is None else {question.id for question in questions}
    if unknown := [key for key in answers if key not in known]:
        raise SourceError(f"{path}: {listed(unknown, UNKNOWN)}")
    return answers


def listed(ids: Sequence[int], told: str) -> str:
    """'2 questions without an answer: 7, 9', with the first few ids."""
    return f"{len(ids)} {told}: {', '.join(map(repr, ids[:NAMED]))}{', ...' if len(ids) > NAMED else ''}"
