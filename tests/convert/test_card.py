"""The model card: what it says of a training, from its configurations and its results.json."""

import json
import re
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from opt_jax.convert.card import TESTED, limitations, model_card, training_data
from opt_jax.convert.card_results import results
from opt_jax.convert.card_usage import usage
from opt_jax.convert.export import held
from opt_jax.convert.preparation import Preparation
from opt_jax.convert.shards import ExportError

ROOT = Path(__file__).parents[2]
SETTINGS = {"regions": "detector", "num_drawn": 1, "max_text_tokens": 20, "max_seconds": 5.0}
SCENES = ConfigDict(dict(source="spoken_scenes", manifest=""))
EVERYTHING = {name: Path(name) for name in ("detector", "wav2vec2", "dvae")}
CONFIG = {"num_layers": 1, "hidden_size": 8, "vocab_size": 9, "dtype": "float32"}


def of(workdir=Path("nowhere"), data=SCENES, encoders=EVERYTHING, settings=SETTINGS, **config):
    config.setdefault("evaluation", {})
    return Preparation(encoders, settings, workdir, ConfigDict(config), data, 3, 1700)


def figures(prepared, dtype="float32", only="all", evaluated=True):
    return results(prepared, dtype, only, evaluated)


def finetuned(task, inputs, *, kind="pretraining", source="", evaluation=(), **more):
    own = ConfigDict(dict(kind=kind, source=source, decibels=3.0))
    prepared = of(task=task, inputs=inputs, evaluation=dict(evaluation), **more)
    prepared.config.data = own
    return prepared


@pytest.mark.parametrize(
    "task, inputs, said, unsaid",
    [
        ("captioning", ("I", "A"), 'processor.write(model, image="dog.jpg")', "matching_logits"),
        ("speech_recognition", ("I+A",), 'write(model, image="dog.jpg", audio="dog.wav")', "matching_logits"),
        ("text_to_image", ("T",), 'processor.draw(model, text="a dog").save', "matching_logits"),
        ("retrieval", ("T+I", "T+A"), "output.matching_logits[0, [3, 4]]", "processor.draw"),
        ("retrieval", ("T+A",), "output.matching_logits[0, [2, 4]]", "processor.draw"),
        ("classification", ("I",), "model.config.id2label[number]", "processor.write"),
        ("vqa", ("T", "T+I"), 'model(**processor(text="what is this?", image="dog.jpg"))', "matching_logits"),
    ],
)
def test_a_fine_tuned_model_is_shown_at_its_task_alone(task, inputs, said, unsaid):
    lines = "\n".join(usage(finetuned(task, inputs), "all"))
    assert said in lines and unsaid not in lines
    without = "\n".join(usage(finetuned(task, inputs), "encoder"))
    assert "processor(" in without and ".write(" not in without and ".draw(" not in without


def test_inputs_that_the_folder_cannot_prepare_are_not_shown():
    ready = SETTINGS | {"regions": "ready"}
    prepared = finetuned("classification", ("I", "A", "T"), settings=ready, encoders={"dvae": Path("dvae")})
    assert 'processor(text="a dog")' in usage(prepared, "all")[0]
    assert usage(of(settings=ready, encoders={}), "all")[0] == 'output = model(**processor(text="a dog"))'


def test_the_encoder_alone_comes_without_an_unused_vae():
    assert set(held(of(), "all").encoders) == set(EVERYTHING)
    assert set(held(of(), "encoder").encoders) == {"detector", "wav2vec2"}
    grid = of(settings=SETTINGS | {"regions": "grid"}, encoders={"detector": None, "dvae": Path("dvae")})
    assert set(held(grid, "encoder").encoders) == {"dvae"}


def test_data_are_called_by_kind_and_file_name():
    assert training_data(of()).startswith("3 rows of *Spoken Scenes*")
    mine = ConfigDict(dict(source="manifest", manifest="/home/me/mine + vqa:/home/q.json,images=/home"))
    told = training_data(of(data=mine))
    assert "3 rows of `mine` (manifest) and `q.json` (vqa)." in told and "home" not in told
    for kind, source, said in (
        ("pretraining", "", "Fine-tuned on the data of its pre-training, 3 rows of `mine` (manifest) and"),
        ("source", "karpathy:/home/f30k.json,images=/home", "Fine-tuned on `f30k.json` (karpathy), after"),
        ("noise", "", "White noise was added, the speech 3 dB louder."),
        ("questions", "", "Fine-tuned on questions that were made about the data of its pre-training"),
    ):
        told = training_data(finetuned("vqa", ("T+I",), kind=kind, source=source, data=mine))
        assert said in told and "home" not in told


def test_the_code_takes_any_folder_name():
    card = model_card(of(), CONFIG, 'a"b\\n', "all", True)
    names = {}
    line = card.split("\nfolder = ")[1].splitlines()[0]
    exec(f"folder = {line}", names)
    assert names["folder"] == 'a"b\\n' and "Tested with torch 2." in card


def test_results_that_are_no_numbers_are_left_out(tmp_path):
    found = {"a/x": "text", "a/y": None, "a/z": True, "a/w": 3, "a/v": [1], "seconds/data": 9}
    (tmp_path / "results.json").write_text(json.dumps(found | {"a/nan": float("nan")}))
    assert figures(of(tmp_path)).splitlines()[4:] == ["| `a/w` | 3.00 |  |"]
    for content in ("{", "[]", "\xff"):
        (tmp_path / "results.json").write_bytes(content.encode("latin-1"))
        with pytest.raises(ExportError, match=r"results.json.* evaluate again"):
            figures(of(tmp_path))
    assert "training was not evaluated" in figures(of(tmp_path / "nowhere"))


def test_figures_are_those_of_the_step_the_dtype_and_the_parts_that_are_exported(tmp_path):
    names = ("captioning/image/CIDEr", "speech_recognition/audio/WER", "text_to_image/named_objects_found")
    names += ("retrieval/text_to_image/R@1", "classification/chance/mAP", "classification/I/mAP")
    (tmp_path / "results.json").write_text(json.dumps(dict.fromkeys(names, 50)))
    prepared = of(tmp_path)
    whole = figures(prepared)
    assert "in float32:" in whole and all(name in whole for name in ("CIDEr", "Word error", "drawn", "R@1"))
    assert "in float32; this folder's weights are bfloat16:" in figures(prepared, dtype="bfloat16")
    assert "in bfloat16; this folder's weights are float32:" in figures(of(tmp_path, precision="bfloat16"))
    # Recall is that of the best combination, in which the text decoder has a part.
    (row,) = [line for line in figures(prepared, only="encoder").splitlines() if "50.00" in line]
    assert "mAP" in row
    (tmp_path / "results.json").write_text(json.dumps(dict.fromkeys(names[:4], 50)))
    assert "50.00" not in figures(prepared, only="encoder")
    told = figures(prepared, evaluated=False)
    assert told.startswith("Step 1,700 was not evaluated") and "50.00" not in told
    assert "after step 1,700." in model_card(prepared, CONFIG, "name", "all", True)


def test_versions_are_those_of_the_tests():
    pinned = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "requirements.lock.txt").read_text(), re.M))
    told = re.findall(r"(\w+) (\d+\.\d+)", TESTED)
    assert len(told) == 5
    for name, version in told:
        assert pinned[name.lower()].startswith(f"{version}."), name


def test_pictures_that_were_chosen_among_several_are_told_at_their_figure(tmp_path):
    name = "text_to_image/named_objects_"
    found = {f"{name}found": 50.0, f"{name}ceiling": 90.0, "text_to_image/code_accuracy": 7.0}
    (tmp_path / "results.json").write_text(json.dumps(found))
    best_of = finetuned("text_to_image", ("T",), evaluation={"drawn": 8}, workdir=tmp_path)
    beside = "ceiling 90.0; the best of 8 pictures for each text; here one picture"
    assert f"| Named objects drawn | 50.00 | {beside} |" in figures(best_of)
    assert "is the matching head of the pre-trained model, which is not in" in limitations(best_of, "all")
    one = finetuned("text_to_image", ("T",), evaluation={"drawn": 1}, workdir=tmp_path)
    assert "| 50.00 | ceiling 90.0 |" in figures(one) and "matching head" not in limitations(one, "all")
