"""VQA v2's questions, annotations and results, in small, as they are published."""

import json

import pytest

from opt_jax.data import questions as module
from opt_jax.data.question_results import read_answers, write_answers
from opt_jax.data.questions import Question, read_vqa
from opt_jax.data.triplet import SourceError, UnusableSampleError

QUESTIONS = [
    {"image_id": 262148, "question": "Where is he looking?", "question_id": 262148000},
    {"image_id": 393225, "question": "What is the name?", "question_id": 393225000},
]


def annotation(question: dict, *answers, **others) -> dict:
    given = [
        {"answer": answer, "answer_confidence": "yes", "answer_id": number}
        for number, answer in enumerate(answers, 1)
    ]
    return {
        "question_type": "none of the above",
        "multiple_choice_answer": answers[0] if answers else None,
        "answers": given,
        "image_id": question["image_id"],
        "answer_type": "other",
        "question_id": question["question_id"],
        **others,
    }


ANNOTATIONS = [annotation(QUESTIONS[1], "foo", "", "foo"), annotation(QUESTIONS[0], "down", "at table")]


def write(folder, questions=QUESTIONS, annotations=ANNOTATIONS, **others):
    document = {"info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "data_subtype": "val2014"}
    for name, entries in (("questions", questions), ("annotations", annotations)):
        (folder / f"{name}.json").write_text(json.dumps(document | {name: entries} | others))
    return folder / "questions.json", folder / "annotations.json"


def test_questions_with_and_without_answers(tmp_path):
    paths = write(tmp_path)
    questions, set_aside = read_vqa(*paths)
    first, second = (f"COCO_val2014_000000{number}.jpg" for number in (262148, 393225))
    assert set_aside == [] and questions == [
        Question(262148000, first, "Where is he looking?", ("down", "at table"), "other"),
        Question(393225000, second, "What is the name?", ("foo", "", "foo"), "other"),
    ]
    hidden, _ = read_vqa(paths[0])
    assert [question.answers for question in hidden] == [(), ()] and hidden[0].answer_type is None
    paths = write(tmp_path, data_subtype="test-dev2015")  # whose pictures are test2015's
    assert read_vqa(paths[0])[0][0].image == "COCO_test2015_000000262148.jpg"
    assert read_vqa(paths[0], subset="train2014")[0][0].image == "COCO_train2014_000000262148.jpg"
    some = write(tmp_path, QUESTIONS[:1])
    assert [question.id for question in read_vqa(*some)[0]] == [262148000]


def test_bad_rows_cost_themselves(tmp_path):
    def question(**fields):
        return {"image_id": 3, "question": "What?", "question_id": 3} | fields

    bad = {
        "'questions.json, row 1': question_id is None, expected a whole number": 7,
        "row 2': question_id is '4'": question(question_id="4"),
        "row 3': question_id is True": question(question_id=True),
        "'5': image_id is '../5', expected a whole number of at most 12": question(
            image_id="../5", question_id=5
        ),
        "'6': image_id is 1000000000000, expected": question(image_id=10**12, question_id=6),
        "'7': question is ' ', expected a sentence": question(question=" ", question_id=7),
        "'8': question is None": question(question=None, question_id=8),
        "'9': question is '.ud800'": question(question="\ud800", question_id=9),
        "'262148000': question_id occurs in an earlier row": QUESTIONS[0],
        "'10': answers are in no row of the annotations": question(question_id=10),
        "'11': image_id is 3, expected 4, as its annotation says": question(question_id=11),
        r"'12': answers is \[\], expected a list of": question(question_id=12),
        r"'13': answers is \[\{'answer': 'a'.*expected a list of": question(question_id=13),
        "'14': answers is 'yes'": question(question_id=14),
        "'15': answer_type is 3, expected text": question(question_id=15),
    }
    annotations = [
        *ANNOTATIONS,
        annotation(question(question_id=11, image_id=4), "a"),
        annotation(question(question_id=12)),
        annotation(question(question_id=13), "a", None),
        annotation(question(question_id=14), answers="yes"),
        annotation(question(question_id=15), "a", answer_type=3),
        None,
        ANNOTATIONS[0],
    ]
    questions, set_aside = read_vqa(*write(tmp_path, [QUESTIONS[0], *bad.values()], annotations))
    assert [question.id for question in questions] == [262148000]
    expected = [
        "'annotations.json, row 7': question_id is None, expected a whole number that no earlier row has",
        "'annotations.json, row 8': question_id is 393225000, expected",
        *bad,
    ]
    assert len(set_aside) == len(expected)
    for error, reason in zip(set_aside, expected, strict=True):
        with pytest.raises(UnusableSampleError, match=reason):
            raise error


def test_files_that_are_refused(tmp_path, monkeypatch):
    questions, annotations = write(tmp_path)
    for content, reason in [
        ("{", "is no valid JSON"),
        ("[" * 100_000, "is no valid JSON"),
        ("[]", "has no list 'questions'; it should be as VQA's questions are published"),
        ('{"questions": 3}', "has no list 'questions'"),
        ('{"questions": []}', ": the pictures are of None; give subset, one of train2014, val2014, test2015"),
        ('{"questions": [], "data_subtype": "../x"}', ": the pictures are of '../x'; give subset"),
        ('{"questions": [], "data_subtype": "val2014"}', ": none of its 0 questions can be used"),
        ('{"questions": [3], "data_subtype": "val2014"}', ": none of its 1 questions can be used; sample"),
    ]:
        (tmp_path / "list.json").write_text(content)
        with pytest.raises(SourceError, match=f"list.json ?{reason}"):
            read_vqa(tmp_path / "list.json")
    with pytest.raises(SourceError, match="questions.json has no list 'annotations'"):
        read_vqa(questions, questions)
    with pytest.raises(SourceError, match="gone.json cannot be read: No such file"):
        read_vqa(questions, tmp_path / "gone.json")
    annotations.write_text('{"annotations": []}')
    with pytest.raises(SourceError, match="none of its 2 questions .* answers are in no row"):
        read_vqa(questions, annotations)
    monkeypatch.setattr(module, "MAX_DOCUMENT", 10)
    with pytest.raises(SourceError, match="questions.json has 0 MiB, at most 0"):
        read_vqa(questions)


def test_results(tmp_path):
    questions, _ = read_vqa(write(tmp_path)[0])
    path = tmp_path / "results.json"
    write_answers(path, {393225000: "foo", 262148000: "down"}, questions)
    assert json.loads(path.read_text()) == [
        {"question_id": 262148000, "answer": "down"},
        {"question_id": 393225000, "answer": "foo"},
    ]
    assert read_answers(path, questions) == {262148000: "down", 393225000: "foo"} == read_answers(path)
    before, kept = path.read_bytes(), {262148000: "down", 393225000: "foo"}
    for answers, reason in [
        (kept | dict.fromkeys(range(7), "a"), "7 answers to questions .* not in the set: 0, 1, 2, 3, 4, ..."),
        (kept | {"262148000": "a"}, "1 answers to questions that are not in the set: '262148000'$"),
        ({262148000: "down"}, "1 questions without an answer: 393225000"),
        (kept | {262148000: None}, "1 answers that are no text: 262148000"),
        (kept | {262148000: "\ud800"}, "1 answers that are no text: 262148000"),
    ]:
        with pytest.raises(ValueError, match=f"results.json is not written: {reason}"):
            write_answers(path, answers, questions)
    assert path.read_bytes() == before
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["annotations.json", "questions.json", "results.json"]


@pytest.mark.parametrize(
    "content, reason",
    [
        ({}, " holds dict, expected a list of results"),
        ([{"question_id": 262148000}], ", row 0 is .* and an answer, text"),
        ([{"question_id": "1", "answer": "a"}], ", row 0 is .*, expected a question_id"),
        ([{"question_id": 1, "answer": "a"}] * 2, ", row 1 is .*, expected a question_id that no"),
        ([5], ", row 0 is 5, expected"),
        ([{"question_id": 1, "answer": "a"}], ": 1 answers to questions that are not in the set: 1$"),
    ],
)
def test_results_that_are_refused(tmp_path, content, reason):
    questions, _ = read_vqa(write(tmp_path)[0])
    (tmp_path / "results.json").write_text(json.dumps(content))
    with pytest.raises(SourceError, match=f"results.json{reason}"):
        read_answers(tmp_path / "results.json", questions)
