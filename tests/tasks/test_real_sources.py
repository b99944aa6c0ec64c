"""Fine-tuning on published sets, in small, from the smallest pre-training on pictures and sentences."""

import json
import shutil
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from test_pipeline import smallest_config

from opt_jax import finetuning, pipeline
from opt_jax.cache import FeatureCache
from opt_jax.configuration import ConfigError, load
from opt_jax.data.sources import open_splits
from opt_jax.data.triplet import SourceError
from opt_jax.evaluation.question_answering import normalise_answer, soft_scores, vqa_accuracy
from opt_jax.tasks.input_sets import InputSetError
from opt_jax.tasks.question_answering import scored
from opt_jax.tasks.validation import validate
from opt_jax.trained import Trained, load_trained

ROOT = Path(__file__).parents[2]
WORDS = ("red", "blue", "green", "dark", "bright", "small")
COPIES = 1  # of each training row
COUNTS = {"train": 16, "val": 8, "test": 8}


def save_picture(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(path, quality=90)


def write_karpathy(folder) -> str:
    """dataset_flickr30k.json with pictures in flickr30k-images, one of the train split's missing."""
    pictures, rng = [], np.random.default_rng(0)
    for split, count in COUNTS.items():
        for _ in range(count):
            number = len(pictures)
            sentences = [{"raw": " ".join(rng.choice(WORDS, 3)) + "."} for _ in range(5)]
            name = f"{number}.jpg"
            pictures.append({"imgid": number, "filename": name, "split": split, "sentences": sentences})
            if number != 3:
                save_picture(folder / "flickr30k-images" / name, number)
    (folder / "dataset_flickr30k.json").write_text(json.dumps({"images": pictures}))
    return f"karpathy:{folder}/dataset_flickr30k.json,images={folder}"


def write_vqa(folder) -> str:
    """Questions of train2014 and val2014, two a picture, ten answers each; one picture of val is missing."""
    rng = np.random.default_rng(1)
    for split, first, count in (("train", 1, 8), ("val", 101, 6)):
        subset, questions, annotations = f"{split}2014", [], []
        for image in range(first, first + count):
            if image != 102:
                save_picture(folder / "coco" / subset / f"COCO_{subset}_{image:012d}.jpg", image)
            for number, kind in enumerate(("yes/no", "other")):
                ids = {"question_id": 1000 * image + number, "image_id": image}
                known = ("yes", "no") if kind == "yes/no" else ("red", "blue", "dark-green")
                given = [{"answer": str(answer)} for answer in rng.choice(known, 10)]
                questions.append(ids | {"question": f"is it {WORDS[(image + number) % 6]}?"})
                annotations.append(ids | {"answers": given, "answer_type": kind})
        for name, entries in (("questions", questions), ("annotations", annotations)):
            document = {"data_subtype": subset, name: entries}
            (folder / f"v2_{split}2014_{name}.json").write_text(json.dumps(document))
    files = f"vqa:{folder}/v2_{{split}}2014_questions.json,images={folder}/coco"
    return f"{files},annotations={folder}/v2_{{split}}2014_annotations.json,answers=4,validation=val,test=val"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    return {"karpathy": write_karpathy(folder), "vqa": write_vqa(folder)}


@pytest.fixture(scope="module")
def pretrained(data, tmp_path_factory):
    """Of pictures and sentences, not evaluated; training rows have a copy."""
    workdir = tmp_path_factory.mktemp("pretrained")
    config = smallest_config(workdir, "manifest")
    config.data.update(manifest=data["karpathy"], copies=COPIES)
    config.loader.update(text_lengths=(16,), audio_lengths=(64,))
    config.train.steps = 1
    sources = pipeline.make_sources(config, workdir)
    tokenizer = pipeline.make_tokenizer(config, workdir, sources)
    encoders = pipeline.make_encoders(config, workdir, sources)
    caches = pipeline.make_caches(config, workdir, sources, tokenizer, encoders)
    pipeline.pretrain(config, workdir, caches, tokenizer, encoders)
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    return workdir


def smallest_task(name, pretrained, workdir, source, inputs):
    config = load(ROOT / "configs" / "finetune" / f"{name}.py")
    config.pretrained, config.workdir, config.inputs = str(pretrained), str(workdir), inputs
    config.data.update(kind="source", source=source)
    config.train.update(steps=2, batch_size=8, warmup_steps=1, log_every=1)
    with config.unlocked():
        config.train.mesh = dict(data=1, fsdp=1, tensor=1)
    small = dict(batch_size=5, examples=2, texts=6, beams=2)
    config.evaluation.update({key: value for key, value in small.items() if key in config.evaluation})
    return config


@pytest.mark.slow
def test_captions_of_a_published_set(data, pretrained, tmp_path, capsys):
    config = smallest_task("captioning", pretrained, tmp_path, data["karpathy"], ("I",))
    validate(config)
    results = finetuning.run(config, tmp_path)
    assert "train 16, validation 8, test 8 rows, 0 classes" in capsys.readouterr().out
    assert np.isfinite([results["captioning/image/CIDEr"], results["before/captioning/image/CIDEr"]]).all()
    assert {split: results[f"triplets/{split}"] for split in pipeline.SPLITS} == {
        "train": 15,
        "validation": 8,
        "test": 8,
    }
    assert len(FeatureCache(tmp_path / "cache" / "train" / "features")) == 15 * (1 + COPIES)
    shown = json.loads((tmp_path / "evaluation" / "examples.json").read_text())["captions"]
    assert len(shown) == 2 and len(shown[0]["references"]) == 5
    # Where the files lie is no part of what was trained.
    moved = tmp_path.with_name("moved")
    moved.symlink_to(Path(data["karpathy"].partition(":")[2].partition(",")[0]).parent)
    config.data.source = f"karpathy:{moved}/dataset_flickr30k.json,images={moved}"
    assert finetuning.run(config, tmp_path) == results


@pytest.mark.slow
def test_questions_whose_answers_are_kept_back_get_an_answer_file(data, pretrained, tmp_path):
    folder = Path(data["vqa"].partition(":")[2].partition(",")[0]).parent
    for name in ("v2_train2014", "v2_val2014"):
        for kind in ("questions", "annotations"):
            shutil.copy(folder / f"{name}_{kind}.json", tmp_path)
    asked = json.loads((tmp_path / "v2_val2014_questions.json").read_text())
    (tmp_path / "v2_test2015_questions.json").write_text(json.dumps(asked | {"data_subtype": "test2015"}))
    pictures = tmp_path / "coco"
    shutil.copytree(folder / "coco", pictures)
    for path in (pictures / "val2014").iterdir():
        (pictures / "test2015").mkdir(exist_ok=True)
        shutil.copy(path, pictures / "test2015" / path.name.replace("val2014", "test2015"))
    spec = f"vqa:{tmp_path}/v2_{{split}}_questions.json,images={pictures},answers=4,train=train2014"
    spec += f",annotations={tmp_path}/v2_{{split}}_annotations.json,validation=val2014,test=test2015"
    config = smallest_task("vqa", pretrained, tmp_path / "run", spec, ("T+I",))
    validate(config)
    results = finetuning.run(config, tmp_path / "run")
    assert not [key for key in results if key.startswith("question_answering")]
    answers = json.loads((tmp_path / "run" / "evaluation" / "answers.json").read_text())
    assert [answer["question_id"] for answer in answers] == [q["question_id"] for q in asked["questions"]]
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.slow
def test_vqa_from_files_to_answers(data, pretrained, tmp_path):
    config = smallest_task("vqa", pretrained, tmp_path, data["vqa"], ("T+I", "T"))
    validate(config)
    results = finetuning.run(config, tmp_path)
    keys = [f"{name}/accuracy{way}{kind}" for name in ("T+I", "T") for way in ("", "_written")
            for kind in ("", "_yes_no", "_other")]  # fmt: skip
    assert np.isfinite([results[f"question_answering/{key}"] for key in keys]).all()
    assert results["triplets/train"] == 16 and results["triplets/test"] == 10
    source = open_splits(data["vqa"])["test"]
    questions = [source.question(row) for row in range(len(source))]
    answers = json.loads((tmp_path / "evaluation" / "answers.json").read_text())
    assert [entry["question_id"] for entry in answers] == [question.id for question in questions]
    assert {entry["answer"] for entry in answers} <= set(source.class_names)
    # The official figure of the file, less the two questions whose picture is missing.
    pairs = zip((entry["answer"] for entry in answers), questions, strict=True)
    usable = [(answer, asked.answers) for answer, asked in pairs if "102.jpg" not in asked.image]
    assert len(usable) == 10
    assert vqa_accuracy(*zip(*usable, strict=True)) == results["question_answering/T+I/accuracy"]
    assert 0 < results["question_answering/most_frequent/accuracy"] < 100


def test_scores_of_classes():
    labels = scored(jnp.array([[2, 0, 0], [1, 0, 0]]), jnp.array([[0.5, 1.0, 0], [0.25, 0, 0]]), 4)
    np.testing.assert_array_equal(labels, [[1.0, 0, 0.5, 0], [0, 0.25, 0, 0]])


@pytest.mark.slow
def test_targets_are_peoples_shares(data, pretrained, tmp_path):
    """Also those of the rows' copies."""
    config = smallest_task("vqa", pretrained, tmp_path, data["vqa"], ("T+I",))
    trained = load_trained(pretrained)
    sources, caches = finetuning.make_data(config, trained, tmp_path)
    loaders = {s: finetuning.own_loader(config, trained, cache, whole=True) for s, cache in caches.items()}
    task = finetuning.TASKS["vqa"](config, trained, loaders, sources)
    train = sources["train"]
    rows = np.arange(len(caches["train"]))
    (batch,) = loaders["train"].evaluation_batches(rows, len(rows), (16, 64))
    labels = np.asarray(task.prepare(jax.random.key(0), batch)["labels"])
    assert len(labels) == 16 * (1 + COPIES)
    for row, place in enumerate(caches["train"].source_row):
        shares = soft_scores(map(normalise_answer, train.question(int(place) % 16).answers))
        expected = [shares.get(name, 0) for name in train.class_names]
        np.testing.assert_allclose(labels[row], expected, rtol=1e-6)
    assert len(np.unique(labels)) > 2
    np.testing.assert_array_equal(labels > 0, batch["labels"] > 0)


@pytest.mark.parametrize(
    "task, kind, inputs, change, message",
    [
        ("captioning", "karpathy", ("I", "I+A"), "", "needs audio, which the train split .*; set config.inp"),
        ("captioning", "vqa", ("A",), "", "set config.inputs to sets without A, or name a source with audio"),
        ("retrieval", "karpathy", ("T+A",), "", "needs audio, which the train split"),
        ("classification", "karpathy", ("I",), "", "has no labels, which classification needs; name a"),
        ("vqa", "vqa", ("T+I",), " + {karpathy}", "vqa cannot be mixed with another source; name them alone"),
        ("vqa", "vqa", ("T+I",), ",anwsers=3", "vqa has no option anwsers; it has annotations, answers"),
        ("captioning", "karpathy", ("I",), "x", "published.*x is no folder; it should hold the files"),
    ],
)
def test_what_a_source_lacks_is_told_before_it_is_cached(
    data, tmp_path, task, kind, inputs, change, message
):
    config = smallest_task(task, tmp_path, tmp_path, data[kind] + change.format(**data), inputs)
    with pytest.raises((SourceError, InputSetError), match=message) as told:
        finetuning.make_data(config, a_pretraining(pictures="dvae", speech="wav2vec2"), tmp_path)
    assert "\n" not in str(told.value) and not (tmp_path / "cache").exists()


def test_what_the_pretraining_cannot_take_is_told_before_it_is_cached(data, tmp_path):
    config = smallest_task("captioning", tmp_path, tmp_path, data["karpathy"], ("I",))
    with pytest.raises(InputSetError, match="has image, for which the pre-training in runs/x has no encoder"):
        finetuning.make_data(config, a_pretraining(pictures=None, speech="wav2vec2"), tmp_path)
    config.data.source += ",hold_out=0"
    with pytest.raises(SourceError, match="has splits of its own; leave hold_out out"):
        finetuning.make_data(config, a_pretraining(pictures="dvae", speech=None), tmp_path)


@pytest.mark.parametrize(
    ("task", "kind", "inputs", "lacking", "message"),
    [
        ("vqa", "questions", ("T+I",), "speech", "vqa on questions needs audio, for which the pre-train"),
        ("vqa", "questions", ("A",), "pictures", "needs image, .* has no encoder; name questions about pict"),
        ("speech_recognition", "noise", ("A",), "speech", "speech_recognition on noise needs audio"),
        ("speech_recognition", "noise", ("A", "I+A"), "pictures", "noise needs image, .*; set config.inputs"),
    ],
)
def test_what_the_pretraining_cannot_take_is_told_before_it_is_made(
    tmp_path, task, kind, inputs, lacking, message
):
    config = load(ROOT / "configs" / "finetune" / f"{task}.py")
    config.data.kind, config.inputs = kind, inputs
    encoders = {"pictures": "dvae", "speech": "wav2vec2"} | {lacking: None}
    with pytest.raises(InputSetError, match=message) as told:
        finetuning.make_data(config, a_pretraining(**encoders), tmp_path)
    assert "\n" not in str(told.value) and not list(tmp_path.iterdir())


def test_noise_takes_the_regions_that_pictures_come_with():
    config = load(ROOT / "configs" / "finetune" / "speech_recognition.py")
    config.data.kind = "noise"
    finetuning.check_encoders(config, a_pretraining(pictures=None, speech="wav2vec2", ready=(8, 3)))


def a_pretraining(pictures, speech, ready=None):
    """What is asked of one before anything is cached."""
    extraction = types.SimpleNamespace(pictures=pictures, speech=speech, ready=ready)
    able = Trained.modalities.fget(types.SimpleNamespace(extraction=extraction))
    return types.SimpleNamespace(extraction=extraction, modalities=able, directory="runs/x")


@pytest.mark.parametrize(
    "task, change, message",
    [
        ("captioning", dict(kind="source"), "config.data.source is empty, .* name the data, such as karp"),
        ("vqa", dict(kind="source", source=" "), "config.data.source is empty"),
        ("vqa", dict(source="vqa:q.json"), "but config.data.kind is 'questions'; set config.data.kind to"),
        ("speech_recognition", dict(kind="noise", source="librispeech:x"), "config.data.kind is 'noise'"),
        ("retrieval", dict(kind="sources", source="x"), "choose one of 'pretraining', 'source'"),
    ],
)
def test_a_source_is_named_where_it_is_chosen(tmp_path, task, change, message):
    (tmp_path / "config.json").write_text("{}")
    config = load(ROOT / "configs" / "finetune" / f"{task}.py")
    config.pretrained, config.workdir = str(tmp_path), str(tmp_path / "finetuned")
    validate(config)
    config.data.update(change)
    with pytest.raises(ConfigError, match=message):
        validate(config)
