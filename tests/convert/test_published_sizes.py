"""The published architectures have exactly the parameters of the published files.

Sources: wav2vec 2.0, transformers' classes at the sizes of facebook/wav2vec2-base(-960h) and
wav2vec2-large-lv60, counted; discrete VAE, the classes of `dall-e`, counted; ResNets, torchvision's published
counts (44,549,160 and 60,192,808) less their classifier (2,049,000); the rest of the detector by hand.
"""

import math

import pytest
from ml_collections import ConfigDict

from configs.encoders import dvae as dvae_config
from configs.encoders import wav2vec2 as wav2vec2_config
from opt_jax.convert import dvae, faster_rcnn, wav2vec2
from opt_jax.encoders.resnet import STAGE_SIZES


def count(shapes) -> int:
    return sum(map(math.prod, shapes.values()))


@pytest.mark.parametrize(
    "size, name, expected",
    [
        ("base", None, 94_371_712),
        ("base", "quantizer.codevectors", 95_044_608),
        ("base", "lm_head.weight", 94_396_320),
        ("large", None, 315_438_720),
        ("large", "quantizer.codevectors", 317_390_592),
        ("large", "lm_head.weight", 315_471_520),
    ],
)
def test_wav2vec2(size, name, expected):
    config = wav2vec2_config.get_config(size)
    assert count(wav2vec2.shapes(config, [name] if name else [])) == expected


def test_discrete_vae():
    config = dvae_config.get_config("published")
    sizes = dict(image_size=config.image_size, code_grid=(32, 32))
    shapes = dvae.shapes(ConfigDict(config.model.to_dict() | sizes))
    assert count({path: shape for path, shape in shapes.items() if path.startswith("encoder")}) == 53_786_240
    assert count({path: shape for path, shape in shapes.items() if path.startswith("decoder")}) == 43_829_766


@pytest.mark.parametrize("depth, resnet", [(101, 44_549_160 - 2_049_000), (152, 60_192_808 - 2_049_000)])
def test_visual_genome_detector(depth, resnet):
    shapes = faster_rcnn.shapes(faster_rcnn.published(STAGE_SIZES[depth]))
    learned = {path: shape for path, shape in shapes.items() if not path.endswith(("/mean", "/var"))}
    rpn = (9 * 1024 * 512 + 512) + (512 + 1) * 12 + (512 + 1) * 4 * 12
    classes = (2048 + 1) * 1601 + (2048 + 1) * 4 * 1600
    attributes = 1601 * 256 + (2048 + 256 + 1) * 512 + (512 + 1) * 401
    assert count(learned) == resnet + rpn + classes + attributes == {101: 65_439_822, 152: 81_083_470}[depth]
