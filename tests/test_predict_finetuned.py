"""A fine-tuned model is asked: its parameters answer, what it was not taught is refused, in one line."""

import json
import shutil

import jax
import numpy as np
import pytest
import soundfile
from PIL import Image
from test_finetuning import smallest_task

from opt_jax import finetuning, pipeline
from opt_jax.answers import finetuned_answers, pretrained_answers
from opt_jax.checkpoints import Checkpoints
from opt_jax.data.spoken_scenes import SpokenScenes
from opt_jax.data.triplet import Triplet
from opt_jax.predict import main as predict
from opt_jax.tasks.input_sets import InputSetError
from opt_jax.trained import FineTuned, load_finetuned, load_trained

ASKED = {
    "captioning": (["--image", "--audio"], {"caption"}),
    "speech_recognition": (["--audio"], {"transcript"}),
    "classification": (["--text=a red ball", "--image"], {"labels"}),
    "retrieval": (["--image", "--text=a red ball", "--text=a tree"], {"texts"}),
    "text_to_image": (["--text=a red ball", "--audio"], {"picture"}),
    "vqa": (["--image", "--text=what colour is the ball"], {"answers", "answer_written"}),
}


@pytest.fixture(scope="module")
def trained(pretrained):
    return load_trained(pretrained)


@pytest.fixture(scope="module")
def scene(trained):
    return SpokenScenes(trained.directory / "data", "test")[0]


@pytest.fixture(scope="module")
def files(scene, tmp_path_factory):
    directory = tmp_path_factory.mktemp("files")
    Image.fromarray(scene.image).save(directory / "a.png")
    soundfile.write(directory / "a.wav", scene.audio, 16_000)
    return {"--image": f"--image={directory / 'a.png'}", "--audio": f"--audio={directory / 'a.wav'}"}


def write_down(config, workdir, params):
    """The directory of a fine-tuning, without the fine-tuning: its configuration and a checkpoint."""
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    checkpoints = Checkpoints(workdir / "checkpoints" / "finetune", 1, {})
    checkpoints.save(3, {"params": params}, {})
    checkpoints.close()


def tuned(name, trained, params=None, inputs=None, **rest):
    """A fine-tuned model without the fine-tuning; by default with the parameters of the pre-trained one."""
    config = smallest_task(name, trained.directory, "unused")
    config.inputs = inputs or config.inputs
    config.evaluation.update({"beams": 2} if "beams" in config.evaluation else {})
    model = type(trained.model)(trained.model.model, params or trained.model.params, trained.model.statistics)
    return FineTuned(trained, model, 1, config, **({"classes": None, "class_names": ()} | rest))


def changed(params, part, by=-1.0):
    """The parameters with one part of them multiplied."""
    return params | {part: jax.tree.map(lambda x: x * by, params[part])}


def test_the_fine_tuned_parameters_write(trained, scene):
    shown = Triplet("a", image=scene.image)
    before = pretrained_answers(trained, shown, [])
    assert finetuned_answers(tuned("captioning", trained), shown, []) == before
    other = changed(trained.model.params, "text_decoder")
    (caption,) = finetuned_answers(tuned("captioning", trained, other), shown, []).values()
    assert caption != before["caption"]


@pytest.mark.slow
def test_the_fine_tuned_parameters_draw_and_the_pre_trained_ones_choose(trained):
    asked = Triplet("a"), ["a red ball"]
    before = pretrained_answers(trained, *asked)["picture"]
    params = trained.model.params
    heads = tuned("text_to_image", trained, changed(params, "heads"))
    np.testing.assert_array_equal(finetuned_answers(heads, *asked)["picture"], before)
    drawn = tuned("text_to_image", trained, changed(params, "image_decoder"))
    assert (finetuned_answers(drawn, *asked)["picture"] != before).any()


def test_the_fine_tuned_parameters_compare(trained, scene):
    asked = Triplet("a", image=scene.image), ["a red ball", "a tree"]
    before = pretrained_answers(trained, *asked)["texts"]
    assert finetuned_answers(tuned("retrieval", trained), *asked) == {"texts": before}
    other = tuned("retrieval", trained, changed(trained.model.params, "heads"))
    assert finetuned_answers(other, *asked) != {"texts": before}


def test_labels_have_the_probabilities_of_the_evaluation(trained, scene):
    config = smallest_task("classification", trained.directory, "unused")
    sources, caches = finetuning.make_data(config, trained, trained.directory)
    loaders = {split: finetuning.own_loader(config, trained, c, whole=True) for split, c in caches.items()}
    task = finetuning.TASKS["classification"](config, trained, loaders, sources)
    names = caches["train"].class_names
    width = trained.config.model.hidden_size
    kernel = np.random.default_rng(0).standard_normal((4 * width, len(names))).astype(np.float32)
    classes = {"kernel": kernel, "bias": np.linspace(-1, 1, len(names), dtype=np.float32)}
    model = tuned("classification", trained, classes=classes, class_names=names)
    for text, image, audio in ((scene.caption, None, None), (scene.caption, scene.image, scene.audio)):
        asked = Triplet("a", image=image, audio=audio)
        labels = finetuned_answers(model, asked, [text])["labels"]

        batch = trained.batch([Triplet("a", caption=text, image=image, audio=audio)])
        params = {"opt": trained.model.params, "classes": classes}
        (logits,) = task.answers(params, [batch], np.array([True, image is not None, audio is not None]))
        expected = 1 / (1 + np.exp(-logits[0].astype(np.float64)))
        best = np.argsort(-expected)[:5]
        assert [said["label"] for said in labels] == [names[i] for i in best]
        np.testing.assert_allclose([said["probability"] for said in labels], expected[best], rtol=1e-4)


def test_a_question_is_answered_with_what_its_own_data_know(trained, scene, tmp_path):
    config = smallest_task("vqa", trained.directory, tmp_path)
    features = trained.directory / "cache" / "train" / "features"
    shutil.copytree(features, tmp_path / "cache" / "train" / "features")
    names = pipeline.FeatureCache(features).class_names
    # A head that looks at nothing: its bias alone is the logits.
    classes = {"kernel": np.zeros((4 * trained.config.model.hidden_size, len(names)), np.float32)}
    classes["bias"] = np.arange(len(names), dtype=np.float32) - len(names)
    write_down(config, tmp_path, {"opt": trained.model.params, "classes": classes})
    model = load_finetuned(tmp_path)
    assert model.step == 3 and model.class_names == names
    for triplet, texts in (
        (Triplet("a", image=scene.image), ["what is red"]),
        (Triplet("a", image=scene.image, audio=scene.audio), []),
    ):
        said = finetuned_answers(model, triplet, texts)
        assert [answer["answer"] for answer in said["answers"]] == list(names[::-1][:5])
        expected = 1 / (1 + np.exp(np.arange(1, 6)))
        np.testing.assert_allclose([answer["probability"] for answer in said["answers"]], expected, rtol=1e-5)
        assert set(said) == {"answers", "answer_written"} and isinstance(said["answer_written"], str)


@pytest.mark.parametrize(
    ("name", "parts", "texts", "message"),
    [
        ("vqa", (), ["what?"], "vqa was taught to answer from --text --image or --image --audio; it was"),
        ("vqa", ("image",), [], "it was given --image"),
        ("vqa", ("image", "audio"), ["what?"], "it was given --text --image --audio"),
        ("captioning", (), ["a dog"], "from --image or --audio or --image --audio; it was given --text"),
        ("speech_recognition", ("image",), [], "from --audio or --image --audio; it was given --image"),
        ("text_to_image", ("image",), [], "from --text or --audio or --text --audio; it was given --image"),
        ("text_to_image", ("audio",), ["a", "b"], "answers from one --text, and was given 2"),
        ("retrieval", ("image",), [], "--text --image or --text --audio or --text --image --audio; it was"),
    ],
)
def test_what_was_not_taught_is_not_answered(trained, scene, name, parts, texts, message):
    triplet = Triplet("a", **{part: getattr(scene, part) for part in parts})
    with pytest.raises(InputSetError, match=message.replace("?", r"\?")):
        finetuned_answers(tuned(name, trained), triplet, texts)


def test_a_retrieval_compares_only_the_pairs_it_was_taught(trained, scene):
    seen = Triplet("a", image=scene.image, audio=scene.audio)
    with pytest.raises(InputSetError, match="from --text --image; it was given --text --image --audio"):
        finetuned_answers(tuned("retrieval", trained, inputs=("T+I", "T+I+A")), seen, ["a dog"])
    with pytest.raises(InputSetError, match="from nothing that can be asked here"):
        finetuned_answers(tuned("retrieval", trained, inputs=("T+I+A",)), seen, ["a dog"])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        ("moved", "tell where it is now with --pretrained=DIR"),
        ("unfinished", "holds no checkpoint of its captioning yet"),
        ("other step", "holds no checkpoint of step 9; it has [3]"),
        ("damaged", "not the bits that were saved"),
        ("cut", "cannot be read"),
        ("another cache", "was fine-tuned from another pre-training than the one in"),
        ("another size", "was fine-tuned from another pre-training than the one in"),
        ("no fine-tuning", "is not that of a fine-tuning"),
        ("half a configuration", "config.json is damaged"),
        ("a pre-training", "--pretrained is for a fine-tuning"),
    ],
)
def test_what_is_not_there_is_told_in_a_line(trained, tmp_path, files, capsys, harm, message):
    config, more = smallest_task("captioning", trained.directory, tmp_path), []
    params = trained.model.params
    if harm == "moved":
        config.pretrained = "runs/moved"
    if harm == "another size":
        params = {name: part for name, part in params.items() if name != "heads"}
    if harm == "no fine-tuning":
        config.task = "ablation"
    write_down(config, tmp_path, params)
    state = tmp_path / "checkpoints" / "finetune" / "3" / "state"
    biggest = max((path for path in state.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    if harm == "unfinished":
        shutil.rmtree(tmp_path / "checkpoints")
    if harm == "other step":
        more = ["--step=9"]
    if harm == "damaged":
        record = state.with_name("record") / "metadata"
        hashes = json.loads(record.read_text())
        hashes["hashes"] = {path: value ^ 1 for path, value in hashes["hashes"].items()}
        record.write_text(json.dumps(hashes))
    if harm == "cut":
        biggest.write_bytes(biggest.read_bytes()[:100])
    if harm == "another cache":
        (tmp_path / "before").mkdir()
        record = {"inputs": {"caches": {"train": "other"}}, "outputs": {}, "seconds": 1.0}
        (tmp_path / "before" / "stage.json").write_text(json.dumps(record))
    if harm == "half a configuration":
        (tmp_path / "config.json").write_text('{"task":')
    workdir = tmp_path
    if harm == "a pre-training":
        workdir, more = trained.directory, [f"--pretrained={trained.directory}"]
    with pytest.raises(SystemExit, match="2"):
        predict([f"--workdir={workdir}", files["--image"], *more])
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1, told


def test_a_pre_training_that_moved_is_found_where_it_is_told_to_be(trained, files, tmp_path, capsys):
    config = smallest_task("captioning", "runs/moved", tmp_path)
    write_down(config, tmp_path, trained.model.params)
    flags = [f"--workdir={tmp_path}", f"--pretrained={trained.directory}", files["--image"], "--json"]
    assert predict(flags) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"caption"}


@pytest.mark.slow  # every task is trained
@pytest.mark.parametrize("name", ASKED)
def test_every_fine_tuning_is_asked(name, trained, files, tmp_path, capsys):
    finetuning.run(smallest_task(name, trained.directory, tmp_path), tmp_path)
    capsys.readouterr()
    flags, keys = ASKED[name]
    asked = [f"--workdir={tmp_path}", f"--out={tmp_path / 'drawn.png'}", *(files.get(f, f) for f in flags)]
    assert predict([*asked, "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)
    assert set(answers) == keys
    assert (tmp_path / "drawn.png").is_file() == (name == "text_to_image")
    for said in (*answers.get("labels", ()), *answers.get("answers", ())):
        assert 0 < said["probability"] < 1
    if name == "vqa":
        own = pipeline.FeatureCache(tmp_path / "cache" / "train" / "features").class_names
        assert {said["answer"] for said in answers["answers"]} <= set(own)
    assert predict(asked) == 0
    lines = sum(len(answer) if isinstance(answer, list) else 1 for answer in answers.values())
    assert len(capsys.readouterr().out.splitlines()) == lines
