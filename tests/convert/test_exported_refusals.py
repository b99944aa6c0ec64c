"""What an exported folder's files refuse, in one clear line, before it costs memory or time."""

import json
import struct
import time
import tracemalloc
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from PIL import Image

from opt_jax.convert.preparation import PROCESSOR, SPECIAL
from opt_jax.data import decoding
from opt_jax.encoders.tokenizer import train_tokenizer

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from opt_jax.export import images_opt_jax, sound_opt_jax  # noqa: E402
from opt_jax.export.processing_opt_jax import OptJaxProcessor  # noqa: E402


def noise(samples: int) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, samples).astype(np.float32)


def picture_of(mode: str) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)).convert(mode)


def test_the_bounds_are_those_of_the_training():
    for name in ("MAX_PIXELS", "MIN_SIDE"):
        assert getattr(images_opt_jax, name) == getattr(decoding, name)
    assert sorted(images_opt_jax.KNOWN) == decoding.KNOWN
    for name in ("RATES", "LOUDEST", "QUIETEST", "SHORTEST", "MAX_NUMBERS"):
        assert getattr(sound_opt_jax, name) == getattr(decoding, name)


@pytest.mark.parametrize("mode, extension", [("P", "png"), ("CMYK", "tiff"), ("I;16", "png"), ("F", "tiff")])
def test_modes_that_the_training_refuses_are_refused(mode, extension, tmp_path):
    path = tmp_path / f"picture.{extension}"
    picture = Image.new(mode, (16, 12)) if mode == "I;16" else picture_of(mode)
    picture.save(path)
    with pytest.raises(decoding.UnusableSampleError):
        decoding.decode_image(path.read_bytes(), "row")
    for given in (path, str(path), picture):
        with pytest.raises(ValueError, match="save it as RGB of 8 bits"):
            images_opt_jax.as_array(given)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA"])
def test_modes_that_the_training_takes_give_the_same(mode, tmp_path):
    path = tmp_path / "picture.png"
    picture_of(mode).save(path)
    expected = decoding.decode_image(path.read_bytes(), "row")
    for given in (path, Image.open(path)):
        np.testing.assert_array_equal(images_opt_jax.as_array(given), expected)


def test_colours_of_16_bits_are_refused(tmp_path):
    """Pillow would cut them to 8 without a word."""
    def chunk(name, content):
        check = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)

    rows = zlib.compress(b"".join(b"\0" + bytes(6 * 16) for _ in range(12)))
    header = struct.pack(">IIBBBBB", 16, 12, 16, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", rows), chunk(b"IEND", b""))
    (tmp_path / "deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    for given in (tmp_path / "deep.png", Image.open(tmp_path / "deep.png")):
        with pytest.raises(ValueError, match="16 bits a channel; save it as RGB"):
            images_opt_jax.as_array(given)


def test_a_picture_of_too_many_pixels_is_not_decoded(tmp_path):
    Image.new("1", (8000, 8000)).save(tmp_path / "large.png")
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"large.png.* \[8000, 8000\] pixels, more than 40 million"):
        images_opt_jax.as_array(tmp_path / "large.png")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000
    with pytest.raises(ValueError, match="more than 40 million"):
        images_opt_jax.as_array(np.broadcast_to(np.uint8(0), (8000, 8000, 3)))


def test_files_that_are_missing_or_foreign_are_value_errors(tmp_path):
    (tmp_path / "noise.txt").write_text("noise")
    picture_of("RGB").save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:200])
    wrong = [
        (images_opt_jax.as_array, "noise.txt", "noise.txt is no picture: none of BMP"),
        (images_opt_jax.as_array, "cut.png", "cut.png cannot be used"),
        (images_opt_jax.as_array, "none.png", "none.png: there is no such file"),
        (sound_opt_jax.as_waveform, "noise.txt", "noise.txt cannot be used as sound"),
        (sound_opt_jax.as_waveform, "none.wav", "none.wav: there is no such file"),
    ]
    for function, name, told in wrong:
        with pytest.raises(ValueError, match=told):
            function(tmp_path / name)
    with pytest.raises(ValueError, match="a file's name, a PIL image or .* not NoneType"):
        images_opt_jax.as_array(None)


@pytest.mark.parametrize("rate", [1, 0, -8000, 44100.0, 400_001, "16000", None])
def test_rates_that_make_no_sense_are_refused(rate):
    with pytest.raises(ValueError, match="expected a whole number from 1000 to 400000"):
        sound_opt_jax.as_waveform(noise(20_000), rate)


def test_recordings_of_another_layout_or_loudness_are_refused():
    wrong = [
        (np.stack([noise(9000)] * 2), r"more channels than samples, \[2, 9000\]; expected \[samples, chan"),
        (0.25, "give samples as a numpy array"),
        (noise(9000) * 1e8, "samples up to .*between -1 and 1"),
        (np.full(9000, np.nan, np.float32), "not finite"),
    ]
    for recording, told in wrong:
        with pytest.raises(ValueError, match=told):
            sound_opt_jax.as_waveform(recording)


@pytest.mark.parametrize("rate", [8000, 11_025, 16_000, 22_050, 44_100, 48_000])
def test_the_beginning_alone_gives_the_same(rate):
    waveform, seconds = noise(rate), 0.3
    expected = sound_opt_jax.resampled(waveform, rate)[: int(seconds * 16_000)]
    needed = sound_opt_jax.samples_needed(seconds, rate)
    assert needed < 0.4 * rate
    np.testing.assert_array_equal(sound_opt_jax.as_waveform(waveform, rate, seconds), expected)
    waveform[needed:] = np.nan  # never looked at
    np.testing.assert_array_equal(sound_opt_jax.as_waveform(waveform, rate, seconds), expected)


def test_of_a_long_file_only_the_beginning_is_read(tmp_path):
    path = tmp_path / "long.wav"
    soundfile.write(path, np.tile(noise(44_100), 300), 44_100)
    tracemalloc.start()
    start = time.process_time()
    found = sound_opt_jax.as_waveform(path, seconds=1)
    assert time.process_time() - start < 5 and tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()
    assert len(found) == 16_000


@pytest.fixture
def folder(tmp_path):
    """Of a model that was trained with texts alone."""
    place = tmp_path / "exported"
    place.mkdir()
    tokenizer = train_tokenizer(("a red ball", "two blue boxes"), 120, tmp_path / "tokenizer")
    (place / "tokenizer.json").write_text(tokenizer.model.to_str())
    words = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 9, **SPECIAL}
    (place / "tokenizer_config.json").write_text(json.dumps(words))
    settings = {"auto_map": {"AutoProcessor": PROCESSOR}, "regions": "none", "max_text_tokens": 9}
    settings |= {"num_beams": 3, "max_new_tokens": 5, "num_drawn": 2, "task": None}
    (place / "preprocessor_config.json").write_text(json.dumps(settings))
    (place / "processing_opt_jax.py").write_text("# code")
    return place


def test_a_saved_processor_is_whole(folder, tmp_path):
    processor = OptJaxProcessor.from_pretrained(folder)
    (folder / "detector").mkdir()
    (folder / "detector" / "config.json").write_text("{}")
    processor.settings["num_beams"] = 4
    for _ in range(2):
        processor.save_pretrained(tmp_path / "new" / "saved")
    saved = tmp_path / "new" / "saved"
    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert {str(file.relative_to(saved)) for file in saved.rglob("*") if file.is_file()} == files
    for name in files - {"preprocessor_config.json"}:
        assert (saved / name).read_bytes() == (folder / name).read_bytes()
    back = OptJaxProcessor.from_pretrained(saved)
    assert back.settings == processor.settings and back.settings["num_beams"] == 4
    assert back("a red ball")["input_ids"].tolist() == processor("a red ball")["input_ids"].tolist()
    back.save_pretrained(saved)  # in place
    with pytest.raises(KeyError, match="width"):
        back.detector  # noqa: B018  (an encoder is read when it is asked for)
    with pytest.raises(ValueError, match="has no preprocessor_config.json; name an exported folder"):
        OptJaxProcessor.from_pretrained(tmp_path)


def test_options_of_the_hub_reach_it(folder, monkeypatch):
    import huggingface_hub

    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **o: asked.update(o) or folder)
    options = {"revision": "v2", "cache_dir": "there", "token": "t"}
    OptJaxProcessor.from_pretrained("someone/model", trust_remote_code=True, **options)
    assert asked == options


def test_texts_and_numbers_that_cannot_be_used_are_refused(folder, caplog):
    processor = OptJaxProcessor.from_pretrained(folder)
    model = SimpleNamespace(config=SimpleNamespace(max_text_positions=20))
    processor.dvae = SimpleNamespace()
    wrong = [
        (lambda: processor(text=[]), "the list given as text is empty"),
        (lambda: processor(text=["a", None]), "a text is NoneType, expected str"),
        (lambda: processor(text=5), "a text is int"),
        (lambda: processor(text="a", return_tensors="np"), 'only, "pt"'),
        (lambda: processor.write(model, max_length=0, text="a"), "max_length is 0"),
        (lambda: processor.write(model, max_length=-3, text="a"), "max_length is -3"),
        (lambda: processor.write(model, num_beams=0, text="a"), "num_beams is 0"),
        (lambda: processor.draw(model, ["a", "b"]), "one picture is drawn"),
        (lambda: processor.draw(model), "one picture is drawn"),
        (lambda: processor.draw(model, "a", number=0), "number is 0"),
        (lambda: processor(image="a.png", images=["a.png"]), "image and images are the same"),
        (lambda: processor(images=[picture_of("RGB")]), "trained without pictures"),
        (lambda: processor.labels(["a", ""]), "the text is empty"),
    ]
    for function, told in wrong:
        with pytest.raises(ValueError, match=told):
            function()
    ids = processor(text="ball " * 50, return_tensors="pt")["input_ids"][0].tolist()
    assert len(ids) == 9 and (ids[0], ids[-1]) == (
        processor.tokenizer.cls_token_id,
        processor.tokenizer.sep_token_id,
    )
    assert "indexing errors" not in caplog.text


def test_a_fine_tuned_model_draws_one_picture(folder):
    """Several would be ranked by a head that its training moved."""
    processor = OptJaxProcessor.from_pretrained(folder)
    processor.dvae, processor.settings["task"] = SimpleNamespace(), "text_to_image"
    with pytest.raises(ValueError, match="number is 3, .* fine-tuning for text_to_image moved it"):
        processor.draw(None, "a", number=3)


def test_a_folder_without_the_discrete_vae_has_no_codes(folder):
    processor = OptJaxProcessor.from_pretrained(folder)
    for function in (lambda: processor.draw(None, "a"), lambda: processor.codes(picture_of("RGB"))):
        with pytest.raises(ValueError, match="no dvae/ in the folder.* or exported .*--only=encoder"):
            function()


def test_ids_become_texts_and_texts_labels(folder):
    processor = OptJaxProcessor.from_pretrained(folder)
    texts = ["red ball", "two"]
    labels, inputs = processor.labels(texts), processor(text=texts)
    for row, length in enumerate(inputs["attention_mask"].sum(1) - 1):
        assert labels[row, :length].tolist() == inputs["input_ids"][row, 1 : length + 1].tolist()
        assert labels[row, length - 1] == processor.tokenizer.sep_token_id
        assert (labels[row, length:] == -100).all()
    assert processor.labels("two").tolist() == [labels[1][labels[1] != -100].tolist()]
    for ids in (inputs["input_ids"], inputs["input_ids"].tolist()):
        assert processor.batch_decode(ids) == texts and processor.decode(ids[0]) == texts[0]
