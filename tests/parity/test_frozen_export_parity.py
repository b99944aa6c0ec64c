"""The exported frozen encoders against those here, in float64 and float32, and their way back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from frozen_toy import toy_detector, toy_dvae, toy_speech
from ml_collections import ConfigDict

from opt_jax.convert.__main__ import main
from opt_jax.convert.frozen import frozen
from opt_jax.data.decoding import resampled as resampled_here
from opt_jax.encoders import dvae, dvae_pictures, faster_rcnn, faster_rcnn_pictures, grid
from opt_jax.encoders.frozen import load_frozen, save_frozen
from opt_jax.encoders.wav2vec2 import frame_count, receptive_field
from opt_jax.encoders.wav2vec2_extraction import Extractor, windows

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from opt_jax.export import images_opt_jax, random_opt_jax, sound_opt_jax  # noqa: E402
from opt_jax.export.detector_opt_jax import Detector  # noqa: E402
from opt_jax.export.dvae_opt_jax import DiscreteVAE  # noqa: E402

TOLERANCE = {"float64": 1e-10, "float32": 1e-5}
DETECTORS = {
    "aligned": dict(num_attributes=3),
    "as published": dict(
        pooling="max", refine_boxes=False, caffe_pooling=True, stride_in_1x1=True, anchor_offset=0.0,
        strides=(1, 2, 2), head_stride=1, head_dilation=2, aligned=False, min_box_size=0.0, num_attributes=3,
    ),
    "old alignment": dict(sampling_ratio=0, aligned=False, refine_boxes=False, min_side=0),
}  # fmt: skip


def exported(tmp_path, name, params, config):
    """The folder that an encoder is exported to."""
    save_frozen(tmp_path / f"{name}_here", params, config, {})
    frozen(name, tmp_path / f"{name}_here").write(tmp_path / name, 10**9)
    return tmp_path / name


def close(found, expected, dtype, what):
    """Asserts that shapes and dtypes are equal, and the numbers within `TOLERANCE` times the largest
    magnitude among the expected ones, or times 1 where that is smaller; and that not all of these are 0."""
    found, expected = found.detach().numpy(), np.asarray(expected)
    assert found.shape == expected.shape and found.dtype == expected.dtype == np.dtype(dtype), what
    assert np.abs(expected).max() > 0.1, what
    scale = max(1, np.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE[dtype] * scale, err_msg=what)


def pictures(number, height, width):
    """Noise over patches of colour."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 200, (number, -(-height // 8), -(-width // 8), 3))
    fine = coarse.repeat(8, 1).repeat(8, 2)[:, :height, :width] + rng.integers(0, 56, (height, width, 3))
    return fine.astype(np.uint8)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("patch_size", [1, 2])
def test_the_discrete_vae_agrees(dtype, patch_size, tmp_path):
    with jax.enable_x64(dtype == "float64"):
        params, config = toy_dvae(dtype, patch_size)
        images = pictures(9, config["image_size"], config["image_size"])
        pixels = dvae.map_pixels(images.astype(dtype) / 255)

        def apply(method, x):
            x = dvae.model_of(params).apply({"params": params}, x, method=method)
            return np.asarray(x).transpose(0, 3, 1, 2)

        # What all cells have in common is taken off, so that they differ in their codes.
        params["encoder"]["output"]["bias"] -= apply("logits", pixels).mean((0, 2, 3))
        module = DiscreteVAE.from_folder(exported(tmp_path, "dvae", params, config))
        codes = dvae.encode(params, images)
        np.testing.assert_array_equal(module.encode(images), codes)
        assert len(np.unique(codes)) > 3
        shown = module.pixels(images)
        close(module.features(shown), apply("features", pixels), dtype, "features")
        close(module.logits(shown), apply("logits", pixels), dtype, "logits")
        squares = codes.reshape(-1, 4, 4)
        means = apply("reconstruct", jax.nn.one_hot(squares, 11, dtype=dtype))[:, :3]
        close(module.means(torch.from_numpy(squares).long()), means, dtype, "means")
        found, expected = module.decode(codes), dvae.decode(params, codes)
        assert np.abs(found.astype(int) - expected).max() <= (dtype == "float32")  # a rounding of pixels


@pytest.mark.parametrize("shape", [(90, 30), (20, 90)])
def test_cells_of_a_grid_are_the_same_regions(shape, tmp_path):
    params, config = toy_dvae()
    module = DiscreteVAE.from_folder(exported(tmp_path, "dvae", params, config))
    (image,) = pictures(1, *shape)
    (expected,) = grid.grid_regions(params, [image], config["image_size"], 3)
    features, boxes = module.grid_regions(image, 3)
    close(features, expected["region_features"], "float32", "features")
    np.testing.assert_allclose(boxes, expected["region_boxes"], rtol=0, atol=1e-6)
    assert len(boxes) < 16


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", DETECTORS)
def test_the_detector_finds_the_same_regions(kind, dtype, tmp_path):
    """Alone there, in the corner of a larger canvas here."""
    with jax.enable_x64(dtype == "float64"):
        params, config = toy_detector(dtype, **DETECTORS[kind])
        module = Detector.from_folder(exported(tmp_path, "detector", params, config))
        (image,) = pictures(1, 83, 109)
        small, _ = faster_rcnn_pictures.resized(image, config["min_side"], config["max_side"])
        canvas = faster_rcnn_pictures.in_corner(small, 128, 128)[None]
        expected = jax.device_get(faster_rcnn.detect(params, canvas, config, np.array([small.shape[:2]])))
    found = module.to(getattr(torch, dtype))(image)
    kept = expected.pop("valid")[0]
    assert found.pop("size").tolist() == list(small.shape[:2]) and kept.sum() > 3
    assert len(np.unique(expected["scores"][0][kept])) > 3
    for name, values in expected.items():
        if values.dtype.kind == "i":
            np.testing.assert_array_equal(found[name].numpy(), values[0][kept], err_msg=name)
        else:
            close(found[name], values[0][kept], dtype, name)


@pytest.mark.parametrize("kind, features", [("base", "context"), ("large", "2"), ("base", "conv")])
@pytest.mark.parametrize("seconds, dtype", [(0.4, "float64"), (1.3, "float32")])
def test_speech_features_agree_in_one_window_and_in_several(kind, features, seconds, dtype, tmp_path):
    waveform = 3 + 5 * np.random.default_rng(0).normal(size=int(seconds * 16_000) + 77)
    options = dict(window_seconds=0.5, context_seconds=0.1)
    with jax.enable_x64(dtype == "float64"):
        params, config = toy_speech(dtype, kind, features=features)
        encoder = Extractor(params, ConfigDict(config), **options)
        expected, counts = encoder.extract(waveform[None].astype(dtype), np.array([len(waveform)]))
    module = sound_opt_jax.Speech(exported(tmp_path, "wav2vec2", params, config), **options)
    assert config["normalize_waveforms"] and (counts[0] > module.window) == (seconds > 0.5)
    close(module(waveform), np.asarray(expected)[0, : counts[0]], dtype, "features")


def test_features_of_several_windows_agree_in_float64(tmp_path):
    """The extractor cuts windows in float32, so that here each goes through it by itself."""
    waveform = np.random.default_rng(0).normal(size=20_000)
    options, dtype = dict(window_seconds=0.5, context_seconds=0.1), "float64"
    params, config = toy_speech(dtype, normalize_waveforms=False)
    module = sound_opt_jax.Speech(exported(tmp_path, "wav2vec2", params, config), **options)
    field, expected = receptive_field(ConfigDict(config)), []
    with jax.enable_x64(True):
        encoder = Extractor(params, ConfigDict(config), **options)
        cuts = windows(frame_count(len(waveform), ConfigDict(config)), encoder.window, encoder.context)
        for first, start, stop in cuts:
            part = waveform[first * encoder.hop :][: encoder.window * encoder.hop + field - 1]
            states, _ = encoder.extract(part[None], np.array([len(part)]))
            expected.append(np.asarray(states)[0, start - first : stop - first])
    assert len(cuts) > 2
    close(module(waveform), np.concatenate(expected), dtype, "features")


def test_normalised_speech_agrees_in_float32_and_with_its_letters(tmp_path):
    rng = np.random.default_rng(0)
    waveform = 3 + 5 * rng.normal(size=9000).astype(np.float32)
    params, config = toy_speech(np.float32, "large")
    assert config["normalize_waveforms"]
    encoder, length = Extractor(params, ConfigDict(config)), np.array([len(waveform)])
    folder = exported(tmp_path, "wav2vec2", params, config)
    expected, counts = encoder.extract(waveform[None], length)
    found = sound_opt_jax.Speech(folder, 30, 2)(waveform)
    close(found, np.asarray(expected)[0, : counts[0]], "float32", "features")
    reader = transformers.AutoProcessor.from_pretrained(folder)
    inputs = reader(waveform, sampling_rate=16_000, return_tensors="pt")
    logits = transformers.AutoModelForCTC.from_pretrained(folder)(**inputs).logits
    expected = np.asarray(encoder.logits(waveform[None], length)[0])[:, : counts[0]]
    close(logits, expected, "float32", "letters")
    assert reader.tokenizer.convert_ids_to_tokens([1, 2, 5]) == ["|", "a", "d"]


@pytest.mark.parametrize("head", ["ctc", "quantizer", "none"])
def test_wav2vec2_comes_back_bit_by_bit(head, tmp_path):
    params, config = toy_speech(head=head, features="1", normalize_waveforms=False, vocabulary=("<pad>", "|"))
    folder = exported(tmp_path, "wav2vec2", params, config)
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, told = getattr(transformers, architecture).from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()) and {"ctc": "lm_head", "quantizer": "quantizer"}.get(head, "encoder") in {
        name.split(".")[0] for name, _ in model.named_parameters()
    }
    main(["import", "--kind=wav2vec2", f"--source={folder}", f"--out={tmp_path / 'back'}"])
    back, config_back = load_frozen(tmp_path / "back")
    jax.tree.map(np.testing.assert_array_equal, back, params)
    here = json.loads((tmp_path / "wav2vec2_here" / "config.json").read_text())
    if head != "ctc":
        here["vocabulary"] = []  # which only letters to read have
    assert config_back == here | {"unroll": 1}


MODULES = [("faster_rcnn", "detector", toy_detector), ("dvae", "dvae", toy_dvae)]


@pytest.mark.parametrize("kind, name, toy", MODULES)
def test_modules_come_back_bit_by_bit(kind, name, toy, tmp_path):
    params, config = toy()
    folder = exported(tmp_path, name, params, config)
    main(["import", f"--kind={kind}", f"--source={folder}", f"--out={tmp_path / 'back'}"])
    back, config_back = load_frozen(tmp_path / "back")
    jax.tree.map(np.testing.assert_array_equal, back, params)
    assert config_back == load_frozen(tmp_path / f"{name}_here")[1]
    written = json.loads((folder / "config.json").read_text())
    other = {"rpn_width": 9} if name == "detector" else {"n_init": 6}
    (folder / "config.json").write_text(json.dumps(written | other))
    with pytest.raises(SystemExit, match="cannot reshape|which is no"):
        main(["import", f"--kind={kind}", f"--source={folder}", f"--out={tmp_path / 'other'}"])


@pytest.mark.parametrize("shape", [(64, 64), (90, 41), (33, 200), (12, 17)])
def test_pictures_are_resized_alike(shape):
    (image,) = pictures(1, *shape)
    expected = dvae_pictures.fit_square(image, 48)
    np.testing.assert_array_equal(images_opt_jax.fit_square(image, 48), expected)
    expected, _ = faster_rcnn_pictures.resized(image, 96, 330)
    np.testing.assert_array_equal(images_opt_jax.resized(image, 96, 330), expected)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_recordings_are_resampled_alike(rate):
    waveform = np.random.default_rng(0).normal(size=3001).astype(np.float32)
    found, expected = sound_opt_jax.resampled(waveform, rate), resampled_here(waveform, rate)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed, step, shape", [(0, 0, (8, 256)), (123456, 63, (3, 5))])
def test_the_same_noise_is_drawn(seed, step, shape):
    key = jax.random.fold_in(jax.random.key(seed), step)
    expected = jax.random.gumbel(key, shape, jnp.float32)
    np.testing.assert_allclose(random_opt_jax.gumbel(seed, step, shape), expected, rtol=0, atol=2e-6)
    with pytest.raises(ValueError, match="seed is -1"):
        random_opt_jax.gumbel(-1, step, shape)
