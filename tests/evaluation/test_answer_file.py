"""Scoring a file of answers: figures by hand, and what does not belong together."""

import json

import pytest

from opt_jax.evaluation.answer_file import main

# id: (type, people's answers, the model's): accuracies 1, 0.6 (two of ten agree), 0.
ASKED = {
    1: ("yes/no", ["yes"] * 10, "yes"),
    2: ("yes/no", ["yes"] * 2 + ["no"] * 8, "Yes."),
    3: ("other", ["red"] * 10, "blue"),
}


@pytest.fixture
def files(tmp_path):
    """(answers, questions, annotations), as paths."""
    ids = {key: {"question_id": key, "image_id": key} for key in ASKED}
    questions = [ids[key] | {"question": "is it?"} for key in ASKED]
    annotations = [
        ids[key] | {"answer_type": kind, "answers": [{"answer": answer} for answer in people]}
        for key, (kind, people, _) in ASKED.items()
    ]
    answers = [{"question_id": key, "answer": answer} for key, (_, _, answer) in ASKED.items()]
    documents = {
        "answers": answers,
        "questions": {"data_subtype": "val2014", "questions": questions},
        "annotations": {"annotations": annotations},
    }
    for name, document in documents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    return [tmp_path / f"{name}.json" for name in documents]


def score(files):
    answers, questions, annotations = map(str, files)
    return main([answers, f"--questions={questions}", f"--annotations={annotations}"])


def test_overall_and_by_type(files, capsys):
    assert score(files) == 0
    assert capsys.readouterr().out.splitlines() == [
        "overall: 53.33 % of 3 questions",
        "other: 0.00 % of 1 questions",
        "yes/no: 80.00 % of 2 questions",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda answers: [*answers, {"question_id": 9, "answer": "a"}], "not in the set: 9"),
        (lambda answers: answers[1:], "1 questions without an answer: 1; answer all"),
        (lambda answers: {}, "answers.json holds dict, expected a list"),
    ],
)
def test_what_does_not_belong_together_is_told_in_a_line(files, capsys, change, message):
    files[0].write_text(json.dumps(change(json.loads(files[0].read_text()))))
    assert score(files) == 2
    printed = capsys.readouterr()
    assert message in printed.err and len(printed.err.splitlines()) == 1 and not printed.out


def test_what_one_person_answered_is_left_out(files, capsys):
    annotations = json.loads(files[2].read_text())
    annotations["annotations"][2]["answers"] = [{"answer": "red"}]
    files[2].write_text(json.dumps(annotations))
    assert score(files) == 0
    assert "left out: 1 questions" in (printed := capsys.readouterr().out)
    assert "overall: 80.00 % of 2 questions" in printed
