"""The frozen encoders together, small and with random weights: odd samples, canvases, long recordings."""

import jax
import numpy as np
import pytest

from configs.encoders import detector, dvae, wav2vec2
from opt_jax.cache import extractor as extractor_module
from opt_jax.cache.extractor import FeatureExtractor, together
from opt_jax.cache.schema import Quarantine
from opt_jax.data.triplet import Triplet
from opt_jax.encoders.dvae import DiscreteVAE
from opt_jax.encoders.faster_rcnn import from_config
from opt_jax.encoders.tokenizer import train_tokenizer
from opt_jax.encoders.wav2vec2 import Wav2Vec2
from opt_jax.partitioning import unbox


@pytest.fixture(scope="module")
def extractor(tmp_path_factory):
    region = detector.get_config("tiny").model
    region.update(min_side=40, max_side=70, width=4, head_width=4, rpn_width=4, proposals=12, min_regions=2)
    region.confidence_threshold = 0.0
    model = from_config(region)
    images, boxes = np.zeros((1, 64, 64, 3), np.uint8), np.ones((1, 1, 4), np.float32)
    regions = jax.jit(model.init)(jax.random.key(0), images, boxes)["params"]
    speech = wav2vec2.get_config("tiny").model
    speech.update(conv_dim=(4,) * 7, hidden_size=8, num_layers=1, num_heads=2, intermediate_size=8)
    speech.update(position_kernel=4, position_groups=2)
    clip = np.zeros((1, 400), np.float32)
    sounds = unbox(jax.jit(Wav2Vec2(speech).init)(jax.random.key(1), clip, np.array([400]))["params"])
    pictures = dvae.get_config("tiny")
    sizes = pictures.model.to_dict() | dict(vocab_size=5, n_hid=4, n_init=4)
    network = DiscreteVAE(**sizes)
    pixels = np.zeros((1, 64, 64, 3), np.float32)
    grid = np.zeros((1, 8, 8, 5), np.float32)
    codes = jax.jit(lambda: network.init(jax.random.key(2), pixels, method="logits"))()["params"]
    codes |= jax.jit(lambda: network.init(jax.random.key(2), grid, method="reconstruct"))()["params"]
    tokenizer = train_tokenizer(["a red ball", "a blue box"], 100, tmp_path_factory.mktemp("words"))
    frozen = [(regions, region.to_dict()), ({"wav2vec2": sounds}, speech.to_dict())]
    return FeatureExtractor(*frozen, (codes, sizes | dict(image_size=64)), tokenizer, max_seconds=60.0)


def sample(name, image=None, audio=None):
    return Triplet(id=name, image=image, caption="a red ball", audio=audio)


def picture(seed, height=50, width=60):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def clip(seed, count=8000):
    return np.random.default_rng(seed).normal(size=count).astype(np.float32)


def test_a_bad_sample_costs_itself_alone(extractor):
    broken = clip(1)
    broken[7] = np.nan
    found = extractor.extract(
        [
            sample("good", picture(0), clip(0)),
            sample("dot", picture(0)[:1, :1]),
            sample("nan", audio=broken),
            sample("empty", audio=clip(0, 0)),
            sample("short", picture(0), clip(0, 368)),
            sample("words"),
            Triplet(id="signs", caption="a \ud800 ball", image=picture(0)),
            sample("list", audio=[0.0] * 8000),
            sample("loud", audio=clip(0) * np.float32(1e20)),
            sample("line", np.zeros((8, 3000, 3), np.uint8)),
        ]
    )
    reasons = [result.reason if isinstance(result, Quarantine) else None for result in found]
    assert reasons[0] is None and reasons[5] is None
    assert reasons[1].startswith("sample 'dot': image has 1 x 1 pixels")
    assert reasons[2] == "sample 'nan': audio has 1 samples that are not finite numbers"
    assert reasons[3].startswith("sample 'empty': audio has 0 samples")
    assert reasons[4].startswith("sample 'short': audio has 368 samples (23 ms); one frame needs 400")
    assert reasons[6].startswith("sample 'signs': caption is no valid Unicode")
    assert reasons[7] == "sample 'list': audio is list, expected float32 [samples]"
    assert reasons[8].startswith("sample 'loud': audio has samples up to")
    assert reasons[9].startswith("sample 'line': image has 3000 x 8 pixels: too thin, 0 pixels")
    assert set(found[0]) >= {"text_ids", "region_features", "image_codes", "audio_features"}
    assert set(found[5]) == {"text_ids"}


def test_a_sample_has_the_features_that_it_has_alone(extractor):
    shapes = [(50, 60), (40, 70), (40, 64), (150, 60), (50, 60)]
    samples = [sample(str(i), picture(i, *shape), clip(i, 3000 + 4000 * i)) for i, shape in enumerate(shapes)]
    together_ = extractor.extract(samples)
    for triplet, found in zip(samples, together_, strict=True):
        (alone,) = extractor.extract([triplet])
        assert set(found) == set(alone)
        for name, value in alone.items():
            np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-5, err_msg=name)
        boxes = found["region_boxes"]
        assert len(boxes) and boxes[:, :4].min() >= 0 and boxes[:, :4].max() <= 1 + 1e-6
        assert (boxes[:, 4:6] > 0).all()


def test_fewer_rows_go_through_together_when_they_are_large(extractor, monkeypatch):
    assert together(1) == extractor_module.CHUNK and together(extractor_module.MEMORY) == 1
    samples = [sample(str(i), picture(i), clip(i, 4000)) for i in range(3)]
    expected = extractor.extract(samples)
    monkeypatch.setattr(extractor_module, "MEMORY", 1)
    for found, other in zip(extractor.extract(samples), expected, strict=True):
        for name, value in other.items():
            np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-5)
