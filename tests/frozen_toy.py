"""Toy frozen encoders with random weights, biases and norms drawn too, for the tests of the export."""

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from configs.encoders.wav2vec2 import get_config
from opt_jax.encoders import dvae, faster_rcnn
from opt_jax.encoders.wav2vec2 import Wav2Vec2, Wav2Vec2ForCTC
from opt_jax.encoders.wav2vec2_quantizer import Wav2Vec2ForPretraining
from opt_jax.partitioning import unbox

# With which boxes stay in the picture, and cells differ in their codes.
FACTORS = {"rpn_box/kernel": 0.3, "classifier/kernel": 3}
FACTORS |= {"encoder/input/kernel": 8, "encoder/output/kernel": 10}
LETTERS = ("<pad>", "|", "a", "b", "c", "d")


def drawn(tree, seed: int, dtype) -> dict:
    """Parameters of the shapes of a tree, with which numbers keep their size from layer to layer."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        kernel = "kernel" in path or path.endswith("/v")
        values = rng.normal(size=leaf.shape) * (np.prod(leaf.shape[:-1]) ** -0.5 if kernel else 0.2)
        values *= FACTORS.get(path, 1)
        if path.endswith(("scale", "/g", "var")):
            values = 1 + np.abs(values)
        return values.astype(dtype)

    flat = flatten_dict(unbox(tree), sep="/")
    return unflatten_dict({path: draw(path, leaf) for path, leaf in flat.items()}, sep="/")


def toy_dvae(dtype=np.float32, patch_size: int = 2) -> tuple[dict, dict]:
    """(parameters, configuration) of 3 groups of 2 blocks."""
    config = dict(vocab_size=11, group_count=3, n_hid=8, n_blk_per_group=2, n_init=5, input_width=3)
    config |= dict(patch_size=patch_size, image_size=16 * patch_size, code_grid=[4, 4])
    network = dvae.DiscreteVAE(**{k: v for k, v in config.items() if k not in ("image_size", "code_grid")})
    pixels = jnp.zeros((1, config["image_size"], config["image_size"], 3))

    def init():
        key, codes = jax.random.key(0), jnp.zeros((1, 4, 4, 11))
        found = network.init(key, pixels, method="logits")["params"]
        return found | network.init(key, codes, method="reconstruct")["params"]

    return drawn(jax.eval_shape(init), 1, dtype), config


def toy_detector(dtype=np.float32, **changes) -> tuple[dict, dict]:
    """(parameters, configuration); `changes` of the latter."""
    config = dict(
        num_classes=5, stage_sizes=(1, 1, 2, 1), width=4, strides=(1, 2, 1), stride_in_1x1=False,
        head_width=4, head_stride=2, head_dilation=1, anchor_sizes=(12.0, 24.0, 40.0),
        anchor_ratios=(0.5, 1.0, 2.0), rpn_width=8, pooling="align", pooled_size=6, sampling_ratio=2,
        aligned=True, box_weights=(10.0, 10.0, 5.0, 5.0), proposals_before_nms=60, proposals=20,
        proposal_nms_threshold=0.7, min_box_size=2.0, refine_boxes=True, nms_threshold=0.4,
        confidence_threshold=0.2, min_regions=3, max_regions=8, pixel_mean=(120.0, 118.0, 110.0),
        pixel_std=(50.0, 50.0, 50.0), num_attributes=0, dtype=np.dtype(dtype).name, min_side=96, max_side=120,
    )  # fmt: skip
    config |= changes
    model = faster_rcnn.from_config(config)
    images = np.zeros((1, 32, 32, 3), np.uint8)
    init = lambda: model.init(jax.random.key(0), images, np.zeros((1, 1, 4)))["params"]  # noqa: E731
    return drawn(jax.eval_shape(init), 2, dtype), config


def toy_speech(dtype=np.float32, kind: str = "base", head: str = "ctc", **changes) -> tuple[dict, dict]:
    """(parameters, configuration) of the shape of `kind`, with a `head` 'ctc', 'quantizer' or 'none'."""
    config = get_config(kind)
    small = dict(conv_dim=(6,) * 7, hidden_size=12, num_layers=2, num_heads=3, intermediate_size=20)
    small |= dict(position_kernel=8 if kind == "base" else 5, position_groups=4, vocabulary=LETTERS)
    config.model.update(small | changes)
    config.ssl.update(dict(codebook_size=5, codevector_dim=8, projection_dim=7))
    module = {
        "ctc": lambda: Wav2Vec2ForCTC(config.model),
        "quantizer": lambda: Wav2Vec2ForPretraining(config.model, config.ssl),
        "none": lambda: Wav2Vec2(config.model),
    }[head]()
    waveforms, lengths = jnp.zeros((1, 1600)), np.array([1600])
    tree = jax.eval_shape(lambda: module.init(jax.random.key(0), waveforms, lengths, None)["params"])
    return drawn({"wav2vec2": tree} if head == "none" else tree, 3, dtype), config.model.to_dict()
