"""VQA accuracy of a file of answers, in the official results format, against what people said.

    python -m opt_jax.evaluation.answer_file runs/base_vqa/evaluation/answers.json
        --questions=v2_OpenEnded_mscoco_val2014_questions.json
        --annotations=v2_mscoco_val2014_annotations.json

on one line, prints it over all questions and by type of answer. As on the official server, each question
must have an answer.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from opt_jax.data.question_results import listed, read_answers
from opt_jax.data.questions import PICTURES, Question, read_vqa
from opt_jax.data.triplet import SourceError
from opt_jax.data.vqa import said_by_people
from opt_jax.evaluation.question_answering import answer_accuracies


def accuracies(answers: Mapping[int, str], questions: Sequence[Question]) -> dict[str, tuple[float, int]]:
    """{'overall' or a type of answer: (VQA accuracy in percent, number of questions)}.

    answers: by question id, one for each of the questions, which two or more people answered.
    """
    truths = [said_by_people(question) for question in questions]
    scores = answer_accuracies([answers[question.id] for question in questions], truths)
    types = np.array([question.answer_type or "without a type" for question in questions])
    found = {"overall": (100 * float(scores.mean()), len(scores))}
    for kind in sorted(set(types)):
        found[str(kind)] = (100 * float(scores[types == kind].mean()), int((types == kind).sum()))
    return found


def score(answers_path, questions_path, annotations_path, subset: str | None = None) -> dict:
    """`accuracies` of files; subset as of `read_vqa`. Raises SourceError."""
    questions, set_aside = read_vqa(questions_path, annotations_path, subset)
    answers = read_answers(answers_path, questions)
    if missing := [question.id for question in questions if question.id not in answers]:
        raise SourceError(f"{answers_path}: {listed(missing, 'questions without an answer')}; answer all")
    judged = [question for question in questions if len(question.answers) > 1]  # each is left out in turn
    if not judged:
        raise SourceError(f"{annotations_path}: no question has several answers")
    if left_out := len(set_aside) + len(questions) - len(judged):
        print(f"left out: {left_out} questions that cannot be read, or that one person answered")
    return accuracies(answers, judged)


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(
        "opt_jax.evaluation.answer_file",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("answers", type=Path, help='[{"question_id": ..., "answer": ...}, ...]')
    parser.add_argument("--questions", required=True, type=Path, help="as published for VQA v2")
    parser.add_argument("--annotations", required=True, type=Path, help="people's answers, as published")
    parser.add_argument("--subset", choices=PICTURES, help="of COCO, where the questions do not say it")
    flags = parser.parse_args(arguments)
    try:
        found = score(flags.answers, flags.questions, flags.annotations, flags.subset)
    except SourceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, (accuracy, number) in found.items():
        print(f"{name}: {accuracy:.2f} % of {number} questions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
