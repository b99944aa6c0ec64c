"""An exported folder from raw inputs on: the answers of `opt_jax.predict`, where there is no JAX."""

import json
import os
import shutil
import subprocess
import venv
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import soundfile
from frozen_toy import drawn, toy_detector, toy_dvae, toy_speech
from ml_collections import ConfigDict
from PIL import Image
from test_pipeline import smallest_config

from opt_jax.answers import finetuned_answers, pretrained_answers
from opt_jax.cache import FeatureCache, build_cache
from opt_jax.cache.extraction import Extraction
from opt_jax.checkpoints import Checkpoints
from opt_jax.configuration import load
from opt_jax.convert import opt as conversion
from opt_jax.convert.__main__ import main
from opt_jax.convert.card_usage import finetuned_usage
from opt_jax.convert.place import foreign_entries
from opt_jax.data.triplet import Triplet
from opt_jax.encoders.frozen import load_frozen, save_frozen
from opt_jax.encoders.tokenizer import train_tokenizer
from opt_jax.pipeline import build_model
from opt_jax.predict import read
from opt_jax.trained import load_finetuned, load_trained

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from packaging.requirements import Requirement  # noqa: E402  (transformers needs it)

from opt_jax.export.processing_opt_jax import OptJaxProcessor  # noqa: E402
from opt_jax.export.random_opt_jax import gumbel  # noqa: E402

ROOT = Path(__file__).parents[2]
TEXTS = ("a red ball", "two blue boxes, far apart", "the green star is large")
WITHOUT_JAX = """
import contextlib, io, json, sys
import numpy as np
for name in ("jax", "flax", "opt_jax", "scipy"):
    try:
        __import__(name)
    except ImportError:
        continue
    sys.exit(f"{name} is here")
from transformers import AutoConfig, AutoTokenizer
folder, image, audio, text, out, code = sys.argv[1:]
assert AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == "opt_jax"
with contextlib.redirect_stdout(io.StringIO()) as told:
    exec(code)  # of the card, which loads model and processor
assert type(model).__name__ == "OptJaxModel" and not model.training and model.dtype.itemsize == 4
processor.draw(model, text).save(out)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
ids = tokenizer(text)["input_ids"]
inputs = processor(text=text, image=image, audio=audio)
pair = model(**processor(text=text, image=image))
print(json.dumps({
    "told": told.getvalue().splitlines(),
    "caption": processor.caption(model, image),
    "transcript": processor.transcribe(model, audio, image),
    "heard": np.asarray(processor.draw(model, audio=audio, seed=5)).tolist(),
    "ids": ids, "text": tokenizer.decode(ids, skip_special_tokens=True),
    **{name: inputs[name][0].tolist() for name in ("region_features", "region_boxes", "audio_features")},
    "matching": pair.matching_logits[0].tolist(),
    "similarity": float(pair.text_embeds[0] @ pair.image_embeds[0]),
}))
"""
WITHOUT_PILLOW = """
import sys
import numpy as np
from transformers import AutoModel, AutoProcessor
for name in ("PIL", "soundfile"):
    try:
        __import__(name)
    except ImportError:
        continue
    sys.exit(f"{name} is here")
folder = sys.argv[1]
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
samples = np.sin(np.arange(9000.0))
assert model(**processor(text="a red ball", audio=samples)).matching_logits.shape == (1, 5)
for wrong in (dict(image=np.zeros((32, 32, 3), np.uint8)), dict(image="a.png"), dict(audio="a.wav")):
    try:
        processor(**wrong)
    except ValueError as error:
        assert ("Pillow" if "image" in wrong else "soundfile") in str(error), error
        continue
    sys.exit(f"{wrong} was taken")
"""


class Noise:
    """Pictures and recordings of noise, and TEXTS."""

    class_names = ("circle", "square", "star")

    def __len__(self):
        return len(TEXTS)

    def __getitem__(self, row):
        rng = np.random.default_rng(row)
        image = rng.integers(0, 256, (9, 12, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        image[: 40 + row, :50] //= 2
        samples = 9000 + 2000 * row
        audio = np.sin(np.arange(samples) * (0.02 + 0.05 * row)) + rng.normal(size=samples)
        return Triplet(f"row-{row}", image, TEXTS[row], (0.1 * audio).astype(np.float32))

    def fingerprint(self):
        return {"seed": 0}


def save(directory, params):
    checkpoints = Checkpoints(directory, 1, {})
    checkpoints.save(1, {"params": jax.device_put(params)}, {})
    checkpoints.close()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """The directory of a pre-training with toy encoders, without the training."""
    workdir = tmp_path_factory.mktemp("runs") / "toy"
    config = smallest_config(workdir)
    config.evaluation.max_new_tokens = 20  # the longest text's, as in every configuration
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    for name, toy in (("detector", toy_detector), ("wav2vec2", toy_speech), ("dvae", toy_dvae)):
        save_frozen(workdir / "encoders" / name, *toy(), {})
    tokenizer = train_tokenizer(TEXTS, 120, workdir / "encoders" / "tokenizer")
    places = [workdir / "encoders" / name for name in ("detector", "wav2vec2", "dvae")]
    extraction = Extraction(*places, tokenizer, 5.12)
    schema, features = extraction.schema(), workdir / "cache" / "train" / "features"
    options = {"split": "train", "schema": schema, "examples_per_shard": 10}
    build_cache(Noise(), extraction, features, extraction.fingerprint(Noise()), **options)
    network, _ = build_model(config, FeatureCache(features), tokenizer, 11)
    init = lambda: network.init(jax.random.key(0), *conversion.smallest_batch(network.sizes))  # noqa: E731
    params = drawn(jax.eval_shape(init)["params"], 4, np.float32)
    for block in ("mlp_in", "mlp_out", "cross_out"):  # so that texts do not say one word again and again
        params["text_decoder"]["layers"][block]["kernel"] *= 5
    save(workdir / "checkpoints" / "pretrain", params)
    (workdir / "results.json").write_text(json.dumps({"captioning/image/CIDEr": 12.345, "seconds/data": 1}))
    return workdir


@pytest.fixture(scope="module")
def folder(workdir, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "toy-model"
    main(["export", f"--checkpoint={workdir}", f"--out={out}"])
    return out


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A picture, and a recording of two channels at another rate."""
    place, sample = tmp_path_factory.mktemp("files"), Noise()[1]
    Image.fromarray(sample.image).save(place / "noise.png")
    soundfile.write(place / "noise.wav", np.stack([sample.audio, sample.audio / 2], 1), 22_050)
    return SimpleNamespace(image=place / "noise.png", audio=place / "noise.wav")


def needed(name: str, found: set) -> set:
    """The distributions that one needs, itself with them."""
    name = metadata.distribution(name).metadata["Name"].lower()
    if name not in found:
        found.add(name)
        for line in metadata.requires(name) or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                needed(requirement.name, found)
    return found


def environment_without_jax(place: Path, reads_files: bool = True) -> Path:
    """The Python of a virtual environment that has torch and transformers, with Pillow and soundfile where it
    `reads_files`, and what they need, by links to the packages here."""
    venv.create(place, symlinks=True)
    (site,) = place.glob("lib/python*/site-packages")
    found: set[str] = set()
    for name in ("torch", "transformers", "safetensors", *(("pillow", "soundfile") if reads_files else ())):
        needed(name, found)
    assert not found & {"jax", "jaxlib", "flax", "scipy", "opt-jax", "opt_jax"}
    for name in found:
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            target = Path(distribution.locate_file(top))
            if target.exists() and not (site / top).exists():
                (site / top).symlink_to(target)
    return place / "bin" / "python"


def run(python: Path, script: str, *arguments, place: Path) -> str:
    """What a script prints that runs in `place`, without a network."""
    environment = os.environ | {"HF_HOME": str(place / "hub"), "HF_HUB_OFFLINE": "1"}
    command = [python, "-I", "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=place, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_where_there_is_no_jax_the_answers_are_those_of_predict(workdir, folder, files, tmp_path):
    python = environment_without_jax(tmp_path / "venv")
    text, picture = TEXTS[2], tmp_path / "picture-3.png"
    shutil.copytree(folder, tmp_path / folder.name)
    shutil.copyfile(files.image, tmp_path / "dog.jpg")  # as the card calls them; what is in it decides
    shutil.copyfile(files.audio, tmp_path / "dog.wav")
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    inputs = (files.image, files.audio, text, picture, code)
    found = json.loads(run(python, WITHOUT_JAX, folder, *inputs, place=tmp_path).splitlines()[-1])

    trained = load_trained(workdir)
    image, audio = read(str(files.image), "image"), read(str(files.audio), "audio")
    shown = Triplet("input", image=image, audio=audio)
    expected = pretrained_answers(trained, shown, [text])
    assert (found["caption"], found["transcript"]) == (expected["caption"], expected["transcript"])
    caption, transcript, match = found["told"]
    assert caption == expected["caption"] and transcript and 0 < float(match) < 1
    assert Image.open(tmp_path / "picture.png").size == Image.open(picture).size
    assert len(set(found["caption"].split())) > 2 and found["caption"] != found["transcript"]
    assert found["ids"] == trained.tokenizer.encode(text) and found["text"] == text
    drawn_here = pretrained_answers(trained, Triplet("input"), [text])["picture"]
    np.testing.assert_allclose(np.asarray(Image.open(picture), int), drawn_here, rtol=0, atol=1)
    heard = pretrained_answers(trained, Triplet("input", audio=audio), [], seed=5)["picture"]
    np.testing.assert_allclose(found["heard"], heard, rtol=0, atol=1)
    batch = trained.batch([shown])
    rounding = 2.0**-10  # of features in float16, where both may round to neighbours
    for name, relative in (("region_features", rounding), ("region_boxes", 0), ("audio_features", rounding)):
        valid = batch[f"{name.split('_')[0]}_valid"][0]
        expected_here = batch[name][0][valid].astype(np.float32)
        np.testing.assert_allclose(found[name], expected_here, rtol=relative, atol=1e-5, err_msg=name)
    match = 1 / (1 + np.exp(found["matching"][4] - found["matching"][3]))
    (said,) = [said for said in expected["texts"] if said["with"] == "image"]
    np.testing.assert_allclose(match, said["match"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(found["similarity"], said["similarity"], rtol=0, atol=1e-4)


def test_texts_and_samples_need_neither_pillow_nor_soundfile(folder, tmp_path):
    python = environment_without_jax(tmp_path / "venv", reads_files=False)
    run(python, WITHOUT_PILLOW, folder, place=tmp_path)


def test_several_inputs_are_padded_and_answered_each_as_alone(folder):
    from opt_jax.export.modeling_opt_jax import OptJaxModel

    model, processor = OptJaxModel.from_pretrained(folder), OptJaxProcessor.from_pretrained(folder)
    samples = [Noise()[row] for row in range(2)]
    images, audios = [sample.image for sample in samples], [sample.audio for sample in samples]
    together = processor(text=list(TEXTS[:2]), image=images, audio=audios)
    assert not together["attention_mask"].all() and not together["audio_attention_mask"].all()
    with torch.no_grad():
        logits = model(**together).matching_logits
        for row, sample in enumerate(samples):
            alone = model(**processor(text=sample.caption, image=sample.image, audio=sample.audio))
            torch.testing.assert_close(logits[row], alone.matching_logits[0], rtol=0, atol=1e-5)
    assert processor.caption(model, images) == [processor.caption(model, image) for image in images]
    assert len(processor(text="star " * 50)["input_ids"][0]) == 20
    assert processor(text="star " * 50)["input_ids"][0, -1] == processor.tokenizer.sep_token_id


def test_texts_and_pictures_become_what_the_model_is_trained_by(workdir, folder):
    from opt_jax.export.modeling_opt_jax import OptJaxModel

    processor, cache = OptJaxProcessor.from_pretrained(folder), FeatureCache(workdir / "cache/train/features")
    labels = processor.labels(list(TEXTS))
    assert not vars(processor).keys() & {"detector", "dvae", "speech"}  # texts need none of them
    images = [Noise()[row].image for row in range(len(TEXTS))]
    codes = processor.codes(images)
    expected = np.stack([cache[row]["image_codes"] for row in range(len(TEXTS))])
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_array_equal(processor.codes(images[1]), expected[1:2])
    model = OptJaxModel.from_pretrained(folder)
    inputs = processor(images=images)
    assert model(**inputs, labels=labels, image_codes=codes).loss > model(**inputs, labels=labels).loss > 0


def test_answers_to_questions_are_those_of_predict(workdir, tmp_path):
    from opt_jax.export.modeling_opt_jax import OptJaxModel

    config, tuned = load(ROOT / "configs" / "finetune" / "vqa.py"), tmp_path / "vqa"
    config.pretrained, config.data.kind = str(workdir), "pretraining"
    params = load_trained(workdir).model.params
    classes = {"kernel": jax.ShapeDtypeStruct((4 * 32, 3), float), "bias": jax.ShapeDtypeStruct((3,), float)}
    save(tuned / "checkpoints" / "finetune", {"opt": params, "classes": drawn(classes, 5, np.float32)})
    (tuned / "config.json").write_text(json.dumps(config.to_dict()))
    main(["export", f"--checkpoint={tuned}", f"--out={tmp_path / 'out'}"])
    model, processor = (part.from_pretrained(tmp_path / "out") for part in (OptJaxModel, OptJaxProcessor))
    found = load_finetuned(tuned)
    for row, question in enumerate(TEXTS):
        image = Noise()[row].image
        expected = finetuned_answers(found, Triplet("input", image=image), [question])["answer_written"]
        assert processor.write(model, text=question, image=image) == expected
        assert expected != processor.write(model, text=question, image=image, num_beams=3, max_length=20)
    with pytest.raises(ValueError, match="fine-tuning for vqa moved it"):
        processor.draw(model, TEXTS[0], number=2)


def test_pictures_are_drawn_with_the_guidance_of_the_settings(folder):
    from opt_jax.export.modeling_opt_jax import OptJaxModel

    model, processor = OptJaxModel.from_pretrained(folder), OptJaxProcessor.from_pretrained(folder)
    assert processor.settings["guidance"] == 0
    options, drawn = {"top_k": processor.settings["top_k"]}, {}
    for guidance in (0.0, 4.0):
        processor.settings["guidance"] = guidance
        drawn[guidance] = np.asarray(processor.draw(model, TEXTS[0], seed=1, number=1))
        noise = lambda step, shape: gumbel(1, step, shape)  # noqa: E731
        output = processor.encoded(model, text=TEXTS[0])
        codes, _ = model.generate_image_codes(output, guidance=guidance, noise=noise, **options)
        np.testing.assert_array_equal(drawn[guidance], processor.dvae.decode(codes)[0])
    assert (drawn[0.0] != drawn[4.0]).any()


def test_a_saved_model_and_processor_are_found_by_transformers(folder, tmp_path):
    from transformers import AutoModel, AutoProcessor

    sample = Noise()[0]
    inputs = {"text": sample.caption, "image": sample.image, "audio": sample.audio}
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "saved")
    again = AutoModel.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    found = AutoProcessor.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert type(found).__name__ == "OptJaxProcessor"
    with torch.no_grad():
        expected = model(**processor(**inputs)).matching_logits
        torch.testing.assert_close(again(**found(**inputs)).matching_logits, expected, rtol=0, atol=1e-5)


def test_the_encoders_come_back(workdir, folder, tmp_path):
    for name, kind in (("detector", "faster_rcnn"), ("wav2vec2", "wav2vec2"), ("dvae", "dvae")):
        main(["import", f"--kind={kind}", f"--source={folder / name}", f"--out={tmp_path / name}"])
        expected = load_frozen(workdir / "encoders" / name)[0]
        jax.tree.map(np.testing.assert_array_equal, load_frozen(tmp_path / name)[0], expected)


def test_the_card_tells_use_data_results_and_licence(folder):
    card = (folder / "README.md").read_text()
    for told in ("processor.caption(model", "processor.draw(model", "3 rows of *Spoken Scenes*", "12.35"):
        assert told in card
    assert 'folder = "toy-model"' in card and "Apache License" in card and "## Limitations" in card


def test_the_lines_for_fine_tuned_models_run(folder, files, tmp_path, monkeypatch, capsys):
    from opt_jax.export.modeling_opt_jax import OptJaxModel

    model, processor = OptJaxModel.from_pretrained(folder), OptJaxProcessor.from_pretrained(folder)
    shutil.copyfile(files.image, tmp_path / "dog.jpg")
    shutil.copyfile(files.audio, tmp_path / "dog.wav")
    monkeypatch.chdir(tmp_path)
    for task, inputs in (
        ("captioning", ("I+A",)),
        ("speech_recognition", ("A",)),
        ("text_to_image", ("T+A",)),
        ("retrieval", ("T+A",)),
    ):
        lines = finetuned_usage(ConfigDict(dict(task=task, inputs=inputs)), (True,) * 3, "all")
        exec("\n".join(lines), {"model": model, "processor": processor})
        assert capsys.readouterr().out.strip() or task == "text_to_image"
    assert Image.open(tmp_path / "picture.png").size
    assert not foreign_entries(folder)


def test_what_cannot_be_used_is_told_in_one_line(folder, tmp_path):
    processor, sample = OptJaxProcessor.from_pretrained(folder), Noise()[0]
    (tmp_path / "noise.txt").write_text("noise")
    wrong = [
        (dict(), "give a text"),
        (dict(text=" "), "is empty"),
        (dict(image=sample.image[..., :2]), r"uint8 \[72, 96, 2\], expected"),
        (dict(image=sample.image[:4]), "a side needs 8"),
        (dict(image=np.zeros((8, 800, 3), np.uint8)), "too thin"),
        (dict(audio=sample.audio[:300]), "has 300 samples"),
        (dict(audio=0 * sample.audio), "silent"),
        (dict(audio=(sample.audio * 100).astype(np.int16)), "expected floats"),
        (dict(text=["a", "b"], image=sample.image), "as many"),
    ]
    for inputs, told in wrong:
        with pytest.raises(ValueError, match=told):
            processor(**inputs)
    for kind, told in (("ready", "region_features and region_boxes"), ("none", "without pictures")):
        processor.settings["regions"] = kind
        with pytest.raises(ValueError, match=told):
            processor(image=sample.image)
    processor.speech = processor.dvae = None
    with pytest.raises(ValueError, match="without recordings"):
        processor(audio=sample.audio)
    with pytest.raises(ValueError, match="no dvae/ in the folder"):
        processor.draw(None, "a ball")
