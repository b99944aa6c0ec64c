"""Questions about pictures with the answers that people gave: VQA v2 (visualqa.org, Goyal et al., 2017).

They are read from the files as published: v2_OpenEnded_mscoco_val2014_questions.json and
v2_mscoco_val2014_annotations.json. `opt_jax.data.vqa` makes a source of them; what a model answers is written
by `opt_jax.data.question_results`.
"""

import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opt_jax.data.decoding import MAX_CAPTION, is_unicode
from opt_jax.data.triplet import SourceError, UnusableSampleError

PICTURES = {name: name for name in ("train2014", "val2014", "test2015")} | {"test-dev2015": "test2015"}
MAX_DOCUMENT = 2 << 30  # bytes; the answers of VQA v2's training set, the largest file, have 0.4 GB
MAX_ID = 10**12  # the names of pictures have 12 digits


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a picture.

    Attributes:
      id: of the question, unique in its set. image: name of the picture's file. question: the sentence.
      answers: those of all people asked (10 in VQA v2), as published; none where they are kept back.
      answer_type: 'yes/no', 'number' or 'other', by which accuracies are told apart, or None.
    """

    id: int
    image: str
    question: str
    answers: tuple[str, ...] = ()
    answer_type: str | None = None


def read_vqa(
    questions_path, annotations_path=None, subset: str | None = None
) -> tuple[list[Question], list[UnusableSampleError]]:
    """The questions in their order, and what is wrong with those that cannot be used and are left out.

    Args:
      annotations_path: their answers. Those to other questions may be among them, so that some of the
        questions can be read with the answers to all. A question without is left out.
      subset: COCO's pictures, such as 'val2014', where the questions' `data_subtype` does not say.

    Raises SourceError where a file cannot be read, is another, or no question can be used.
    """
    path, answered = Path(questions_path), None
    questions: dict[int, Question] = {}
    set_aside: list[UnusableSampleError] = []
    document = read_document(path)
    entries = _entries(document, "questions", path)
    subset = document.get("data_subtype") if subset is None else subset
    if not isinstance(subset, str) or subset not in PICTURES:
        known = ", ".join(PICTURES)
        raise SourceError(f"{path}: the pictures are of {reprlib.repr(subset)}; give subset, one of {known}")
    if annotations_path is not None:
        answered = _annotations(Path(annotations_path), set_aside)
    for number, entry in enumerate(entries):
        try:
            question = _question(entry, f"{path.name}, row {number}", subset, answered)
            if question.id in questions:
                raise UnusableSampleError(str(question.id), "question_id", "occurs in an earlier row")
            questions[question.id] = question
        except UnusableSampleError as error:
            set_aside.append(error.with_traceback(None))
    if not questions:
        first = f"; {set_aside[-1]}" if set_aside else ""
        raise SourceError(f"{path}: none of its {len(entries)} questions can be used{first}")
    return list(questions.values()), set_aside


def _annotations(path: Path, set_aside: list[UnusableSampleError]) -> dict[int, dict]:
    annotations: dict[int, dict] = {}
    for number, entry in enumerate(_entries(read_document(path), "annotations", path)):
        key = entry.get("question_id") if isinstance(entry, dict) else None
        if is_number(key) and key not in annotations:
            annotations[key] = entry
        else:
            reason = f"is {reprlib.repr(key)}, expected a whole number that no earlier row has"
            set_aside.append(UnusableSampleError(f"{path.name}, row {number}", "question_id", reason))
    return annotations


def _question(entry, name: str, subset: str, answered: Mapping[int, dict] | None) -> Question:
    def refuse(part: str, value, expected: str):
        raise UnusableSampleError(name, part, f"is {reprlib.repr(value)}, expected {expected}")

    fields = entry if isinstance(entry, dict) else {}
    key, picture, sentence = fields.get("question_id"), fields.get("image_id"), fields.get("question")
    if not is_number(key):
        refuse("question_id", key, "a whole number")
    name = str(key)
    if not is_number(picture):
        refuse("image_id", picture, "a whole number of at most 12 digits")
    if not is_text(sentence) or not sentence.strip():
        refuse("question", sentence, "a sentence")
    image = f"COCO_{PICTURES[subset]}_{picture:012d}.jpg"
    if answered is None:
        return Question(key, image, sentence)
    if key not in answered:
        raise UnusableSampleError(name, "answers", "are in no row of the annotations")
    annotation = answered[key]
    given, answer_type = annotation.get("answers"), annotation.get("answer_type")
    if annotation.get("image_id", picture) != picture:
        refuse("image_id", picture, f"{reprlib.repr(annotation['image_id'])}, as its annotation says")
    answers = [item.get("answer") if isinstance(item, dict) else item for item in _items(given)]
    if not answers or not all(map(is_text, answers)):
        refuse("answers", given, 'a list of {"answer": text}')
    if answer_type is not None and not is_text(answer_type):
        refuse("answer_type", answer_type, "text")
    return Question(key, image, sentence, tuple(answers), answer_type)


def _items(value) -> list:
    return value if isinstance(value, list) else []


def is_number(value) -> bool:
    """Whether `value` can be the number of a question or picture."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_ID


def is_text(value) -> bool:
    """Whether `value` is text that can be written as UTF-8, of a sensible length; it may be empty."""
    return isinstance(value, str) and len(value) <= MAX_CAPTION and is_unicode(value)


def read_document(path: Path) -> Any:
    """What a JSON file holds. Raises SourceError."""
    try:
        if path.stat().st_size > MAX_DOCUMENT:
            raise SourceError(f"{path} has {path.stat().st_size >> 20} MiB, at most {MAX_DOCUMENT >> 20}")
        with open(path, "rb") as file:
            return json.load(file)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} is no valid JSON: {error}") from error


def _entries(document, name: str, path: Path) -> list:
    entries = document.get(name) if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise SourceError(f"{path} has no list {name!r}; it should be as VQA's {name} are published")
    return entries
