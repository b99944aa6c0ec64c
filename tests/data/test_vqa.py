"""VQA v2 as a source: classes out of people's answers, and how much each of them counts."""

import json
import pickle

import numpy as np
import pytest
from raw_files import file_of, picture

from opt_jax.data.mixture import Part
from opt_jax.data.question_results import write_answers
from opt_jax.data.sources import open_split, open_splits
from opt_jax.data.triplet import Source, SourceError, UnusableSampleError
from opt_jax.data.vqa import behind, said_by_people, vocabulary
from opt_jax.evaluation.question_answering import answer_accuracies

YES = ["yes"] * 8 + ["no", "Yes."]
COLOURS = ["Red"] * 2 + ["the red"] + ["dark-red"] * 5 + ["blue", ""]
TWO = ["2", "two", "three"] + ["a dozen"] * 7


def write(folder, split: str, *asked, subset="val2014") -> str:
    """Files of one split: (question id, picture id, question, answers, type); the pictures are there."""
    questions = [{"question_id": i, "image_id": p, "question": q} for i, p, q, *_ in asked]
    annotations = [
        {"question_id": i, "image_id": p, "answer_type": kind, "answers": [{"answer": a} for a in answers]}
        for i, p, _, answers, kind in asked
        if answers
    ]
    (folder / "coco" / subset).mkdir(parents=True, exist_ok=True)
    for entry in questions:
        path = folder / "coco" / subset / f"COCO_{subset}_{entry['image_id']:012d}.jpg"
        path.write_bytes(file_of(picture(seed=entry["image_id"]), "JPEG"))
    for name, entries in (("questions", questions), ("annotations", annotations)):
        (folder / f"{split}_{name}.json").write_text(json.dumps({"data_subtype": subset, name: entries}))
    files = f"vqa:{folder}/{{split}}_questions.json,annotations={folder}/{{split}}_annotations.json"
    return f"{files},images={folder}/coco"


TRAIN = [
    (10, 1, "Is it?", YES, "yes/no"),
    (11, 1, "Which colour? ", COLOURS, "other"),
    (12, 2, "How many?", TWO, "number"),
    (13, 3, "Is it not?", ["no"] * 9 + ["red"], "yes/no"),
]


def test_the_vocabulary_counts_questions_not_people():
    given = [["b", "b", "b", ""], ["a", "c"], ["c", "a"], ["c", ""], ["d"]]
    assert vocabulary(given, 10) == ["c", "a", "b", "d"]
    assert vocabulary(given, 2) == ["c", "a"] and vocabulary([[""]], 3) == []


def test_questions_as_triplets(tmp_path):
    source = open_split(write(tmp_path, "train", *TRAIN), "train")
    assert isinstance(source, Source) and set(source.modalities) == {"text", "image"}
    # 'no' and 'red' are answers to two questions, the others to one each.
    names = ["no", "red", "2", "3", "blue", "dark red", "dozen", "yes"]
    assert source.class_names == names
    first, second = source[0], source[1]
    assert (first.id, first.caption, first.references) == ("10", "Is it?", ("Is it?",))
    assert first.image.shape == (10, 12, 3) and second.caption == "Which colour?"
    assert [names[label] for label in second.labels] == ["red", "blue", "dark red"]
    scores = {
        names[number]: score
        for number, score in zip(source.answer_numbers[1], source.answer_scores[1], strict=True)
        if score
    }
    assert scores == pytest.approx({"red": 0.9, "dark red": 1.0, "blue": 0.3})
    assert source.answer_numbers.shape == source.answer_scores.shape == (4, 3)
    np.testing.assert_allclose(source.answer_scores[2], [0.6, 0.3, 1.0], rtol=1e-6)
    assert source.groups[0] == source.groups[1] != source.groups[2]  # of one picture
    again = pickle.loads(pickle.dumps(source))
    assert again[2].labels == source[2].labels and again.fingerprint() == source.fingerprint()


def test_other_splits_have_the_answers_of_training(tmp_path):
    write(tmp_path, "val", (20, 4, "What?", ["no"] * 2 + ["red"] * 4 + ["green"] * 4, "other"))
    spec = write(tmp_path, "train", *TRAIN) + ",answers=2,validation=val,test=val"
    splits = open_splits(spec)
    assert [source.class_names for source in splits.values()] == [["no", "red"]] * 3
    test = splits["test"]
    assert test[0].labels == (0, 1) and test.answer_scores[0].tolist() == pytest.approx([0.6, 1.0])
    assert test.question(0).answers.count("green") == 4 and test.question(0).answer_type == "other"
    assert splits["train"].fingerprint() != open_splits(spec.replace("=2", "=3"))["train"].fingerprint()


def test_answers_that_are_kept_back_leave_the_questions(tmp_path):
    write(tmp_path, "test", (20, 4, "What?", [], "other"), (21, 4, "Who?", [], "other"), subset="test2015")
    (tmp_path / "test_annotations.json").unlink()
    spec = write(tmp_path, "train", *TRAIN) + ",validation=train"
    test = open_splits(spec)["test"]
    assert not test.answered and test[1].caption == "Who?" and test[1].labels == ()
    assert test.answer_scores.shape == (2, 1) and not test.answer_scores.any()
    assert test.fingerprint() == open_splits(spec)["test"].fingerprint()
    with pytest.raises(SourceError, match="train_annotations.json"):  # training has none without
        open_split(spec.replace("annotations=", "annotations=gone/"), "train")
    write(tmp_path, "test", (20, 4, "What?", [], "other"))
    (tmp_path / "test_annotations.json").unlink()
    with pytest.raises(SourceError, match="no .*test_annotations.json, which only test2015 may lack"):
        open_splits(spec)


def test_blank_answers_agree_with_none(tmp_path):
    source = open_split(write(tmp_path, "train", *TRAIN), "train")
    given = said_by_people(source.question(1))
    assert len(given) == 10
    # 5 of 10 people; 3 of 10, whose accuracy is the mean over nine of them.
    assert answer_accuracies(["dark red", "red", ""], [given] * 3) == pytest.approx([1.0, 0.9, 0.0])


def test_what_is_missing_costs_its_question(tmp_path):
    more = [(14, 5, "Who?", [], "other"), (15, 6, "How?", ["so"], "other"), (16, 7, "Why?", YES, None)]
    source = open_split(write(tmp_path, "train", *TRAIN, *more), "train")
    (tmp_path / "coco/val2014/COCO_val2014_000000000007.jpg").unlink()
    assert len(source) == 7 and source.question(6) is None
    for row, reason in [
        (6, "'14': answers are in no row of the annotations"),
        (4, "'15': answers are those of one person, expected more"),
        (5, "'16': image 'COCO_val2014_000000000007.jpg' cannot be read"),
    ]:
        with pytest.raises(UnusableSampleError, match=reason):
            source[row]
    assert source.caption(4) is None and source.caption(6) is None and source.caption(5) == "Why?"
    with pytest.raises(IndexError, match="row 7 of .*train_questions.json: there are 7"):
        source.question(7)


def test_answers_are_written_for_the_questions_of_the_source(tmp_path):
    source = open_split(write(tmp_path, "train", *TRAIN), "train")
    questions = [source.question(row) for row in range(len(source))]
    write_answers(tmp_path / "answers.json", {i: "yes" for i in (10, 11, 12, 13)}, questions)
    assert json.loads((tmp_path / "answers.json").read_text())[2] == {"question_id": 12, "answer": "yes"}
    with pytest.raises(ValueError, match="1 answers to questions that are not in the set: 99"):
        write_answers(tmp_path / "answers.json", {i: "yes" for i in (10, 11, 12, 13, 99)}, questions)


def test_the_list_behind_a_part_of_it(tmp_path):
    spec = write(tmp_path, "train", *TRAIN)
    source = open_split(spec, "train")
    found, rows = behind(Part(Part(source, [3, 2, 0], "some"), [2, 0], "fewer"))
    assert found is source and rows.tolist() == [0, 3]
    held_out = open_splits(spec.replace("{split}", "train") + ",hold_out=1")
    lists, places = zip(*map(behind, held_out.values()), strict=True)
    assert len(set(map(id, lists))) == 1 and sorted(np.concatenate(places)) == [0, 1, 2, 3]
    (tmp_path / "other.jsonl").write_text('{"id": "a", "caption": "b"}\n')
    assert behind(open_split(f"{tmp_path}/other.jsonl,hold_out=0", "train")) is None
    with pytest.raises(SourceError, match="vqa cannot be mixed with another source; name them alone"):
        behind(open_split(f"{spec} + {tmp_path}/other.jsonl,hold_out=0", "train"))


@pytest.mark.parametrize("answers", ["0", "many", "-3"])
def test_a_number_of_answers_that_is_none(tmp_path, answers):
    spec = f"{write(tmp_path, 'train', *TRAIN)},answers={answers}"
    with pytest.raises(SourceError, match=f"answers={answers}; expected a whole number above 0"):
        open_split(spec, "train")
    with pytest.raises(SourceError, match="needs the option annotations, as in vqa:"):
        open_split(f"vqa:{tmp_path}/{{split}}_questions.json,images={tmp_path}", "train")
