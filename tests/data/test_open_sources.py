import importlib
import json

import pytest
from raw_files import file_of, picture, shard, whole

from opt_jax.data import sources as module
from opt_jax.data.mixture import Mixture, row_weights
from opt_jax.data.sources import KINDS, held_out, open_split, open_splits, parse
from opt_jax.data.triplet import Source, SourceError


def rows(count, **more):
    return [{"id": f"r{i}", "caption": f"Number {i}.", "labels": [f"c{i % 3}"]} | more for i in range(count)]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ids(source) -> list[str]:
    return [triplet.id for triplet in source]


def test_a_folder_with_a_list_for_each_split(tmp_path):
    for split, count in [("train", 4), ("validation", 2)]:
        write(tmp_path / f"{split}.jsonl", rows(count))
    (tmp_path / "test.csv").write_text("id,caption,labels\nt0,A test.,c1|new\n")
    splits = open_splits(str(tmp_path))
    assert {split: len(source) for split, source in splits.items()} == {
        "train": 4,
        "validation": 2,
        "test": 1,
    }
    assert all(source.class_names == ["c0", "c1", "c2"] for source in splits.values())
    assert splits["test"][0].labels == (1,)  # a class that training does not have is left out
    (tmp_path / "test.csv").unlink()
    with pytest.raises(SourceError, match="holds none of test.jsonl, test.csv"):
        open_splits(str(tmp_path))


def test_one_list_is_cut_into_splits(tmp_path):
    path = write(tmp_path / "all.jsonl", rows(60))
    splits = open_splits(f"{path},hold_out=7")
    assert {split: len(source) for split, source in splits.items()} == {
        "train": 46,
        "validation": 7,
        "test": 7,
    }
    assert sorted(sum(map(ids, splits.values()), [])) == sorted(
        ids(open_split(f"{path},hold_out=0", "train"))
    )
    assert all(isinstance(source, Source) for source in splits.values())
    again = open_splits(f"{path},hold_out=7")
    assert all(ids(again[split]) == ids(splits[split]) for split in splits)
    assert len({json.dumps(source.fingerprint()) for source in splits.values()}) == 3
    assert len(open_split(str(path), "test")) == 6  # at most a tenth


@pytest.mark.parametrize("hold_out, fits", [(0, True), (29, True), (30, False), (-1, False), (10**9, False)])
def test_what_is_held_out_has_to_leave_some(tmp_path, hold_out, fits):
    spec = f"{write(tmp_path / 'all.jsonl', rows(60))},hold_out={hold_out}"
    if fits:
        assert len(open_split(spec, "train")) == 60 - 2 * hold_out
        assert len(open_split(spec, "validation")) == hold_out
    else:
        with pytest.raises(SourceError, match="hold_out=.* twice does not fit 60 rows of 60 pictures"):
            open_split(spec, "train")


def test_rows_of_one_picture_stay_together_and_bad_rows_train(tmp_path):
    lines = [{"id": f"r{i}", "image": f"{i % 20}.jpg", "caption": "x"} for i in range(100)]
    lines += [{"id": f"g{i}", "group": f"{i % 5}", "caption": "x"} for i in range(20)]
    path = write(tmp_path / "all.jsonl", [*lines, {"caption": "no id"}, {"id": 3.5}])
    parts = {split: open_split(f"{path},hold_out=9", split) for split in module.SPLITS}
    pictures = {}
    for split, part in parts.items():
        pictures[split] = {(row % 20 if row < 100 else 100 + row % 5) for row in part.rows if row < 120}
    assert not pictures["test"] & pictures["validation"] and not pictures["test"] & pictures["train"]
    assert len(set.union(*pictures.values())) == 25
    assert 9 <= len(parts["test"]) < 14 and 9 <= len(parts["validation"]) < 14
    assert {120, 121} <= set(parts["train"].rows) and sum(map(len, parts.values())) == 122


def test_the_draw_is_the_same_for_ever(tmp_path):
    """Another draw would move pictures from the test split into the training of a resumed run."""
    source = open_split(f"{write(tmp_path / 'all.jsonl', rows(20))},hold_out=0", "train").source
    assert held_out(source, "test", 3).rows.tolist() == [4, 6, 19]


def test_tar_shards_by_pattern(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for number in range(2):
            shard(tmp_path / split / f"{number}.tar", whole(f"{split}{number}"))
    spec = f"{tmp_path}/{{split}}/*.tar,validation=val,test=val"
    assert {split: ids(source) for split, source in open_splits(spec).items()} == {
        "train": ["train0", "train1"],
        "validation": ["val0", "val1"],
        "test": ["val0", "val1"],
    }
    with pytest.raises(SourceError, match="no file is called .*none.*.tar"):
        open_split(f"{tmp_path}/none*.tar", "train")


def test_a_mixture_of_kinds(tmp_path):
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(4)]
    for split in ("train", "val"):
        annotations = [{"id": i, "image_id": i % 4, "caption": f"Of {split} {i}."} for i in range(8)]
        text = json.dumps({"images": images, "annotations": annotations})
        (tmp_path / f"captions_{split}2017.json").write_text(text)
        (tmp_path / f"{split}2017").mkdir()
        (tmp_path / f"{split}2017" / "0.jpg").write_bytes(file_of(picture(), "JPEG"))
    write(tmp_path / "mine.jsonl", rows(20))
    files = f"{tmp_path}/captions_{{split}}2017.json,images={tmp_path}/{{split}}2017"
    coco = f"coco_captions:{files},validation=val,test=val"
    splits = open_splits(f"{coco},weight=2 + {tmp_path}/mine.jsonl,hold_out=2,weight=0.5")
    assert {split: len(source) for split, source in splits.items()} == {
        "train": 24,
        "validation": 10,
        "test": 10,
    }
    train = splits["train"]
    assert isinstance(train, Mixture) and row_weights(train).tolist() == [2.0] * 8 + [0.5] * 16
    assert train.class_names == splits["test"].class_names == ["c0", "c1", "c2"]
    assert train[0].id == "0:0" and train[0].image is not None and train[0].caption == "Of train 0."
    assert train.origin(0) == "0:coco_captions" and train.origin(9) == "1:manifest"
    assert row_weights(open_split(f"{tmp_path}/mine.jsonl,weight=2", "train")).tolist() == [2] * 16
    assert row_weights(open_split(f"{tmp_path}/mine.jsonl", "train")) is None


def test_a_list_is_opened_once(tmp_path, monkeypatch):
    opened = []
    construct = module._construct
    monkeypatch.setattr(module, "_construct", lambda *given: opened.append(given) or construct(*given))
    open_splits(f"{write(tmp_path / 'all.jsonl', rows(30))}")
    assert len(opened) == 1


def test_every_kind_can_be_imported():
    for target in KINDS.values():
        name, _, attribute = target.partition(":")
        assert callable(getattr(importlib.import_module(name), attribute))


def test_parse():
    assert parse("a/b.csv,weight=2,images=x=y") == ("manifest", "a/b.csv", {"weight": "2", "images": "x=y"})
    assert parse("a/*.tar") == ("tar", "a/*.tar", {})
    assert parse("tfds:coco/2014:1.1.0") == ("tfds", "coco/2014:1.1.0", {})


@pytest.mark.parametrize(
    "spec, reason",
    [
        (
            "{list},wieght=2",
            "manifest has no option wieght; it has hold_out, test, train, validation, weight",
        ),
        ("{list},weight", r"after the path come options such as weight=2, found \['weight'\]"),
        ("{list},weight=0", "weight must be above 0"),
        ("{list},weight=nan", "weight must be above 0"),
        ("{list},weight=1e300", "at most 10000"),
        ("{list},validation=test", "names splits, but has no .split. for their names"),
        ("{folder}/empty.csv", "empty.csv holds no rows"),
        ("{folder}/array.json", "array.json is a JSON array; write an object a line"),
        ("{list},weight=two", "weight is .two., expected a number"),
        ("{list},hold_out=few", "hold_out is .few., expected a number"),
        ("{folder}/{{split}}.jsonl,hold_out=3", "has splits of its own; leave hold_out out"),
        (
            "webdataset:{list}",
            "there is no kind 'webdataset'; choose from manifest, tar, localized_narratives",
        ),
        ("manifest:", "names no path"),
        ("{folder}/none.jsonl", "none.jsonl cannot be read: No such file"),
        ("region_npz:{folder}", "region_npz:.* needs the option captions, as in"),
        ("localized_narratives:{list},images={folder}/none", "none is no folder"),
        ("{list} + ", "names no path"),
    ],
)
def test_names_that_are_refused(tmp_path, spec, reason):
    write(tmp_path / "list.jsonl", rows(10))
    (tmp_path / "empty.csv").write_text("id,caption\n")
    (tmp_path / "array.json").write_text('\n [{"id": "a"}]')
    with pytest.raises(SourceError, match=reason):
        open_split(spec.format(list=tmp_path / "list.jsonl", folder=tmp_path), "train")
    with pytest.raises(SourceError, match="split 'dev'; there are train, validation, test"):
        open_split(str(tmp_path / "list.jsonl"), "dev")
