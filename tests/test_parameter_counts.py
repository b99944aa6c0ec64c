"""The size of every variant at the sizes of real data, from a formula written down apart from the model."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from opt_jax.configuration import load
from opt_jax.models.inputs import uncorrupted
from opt_jax.models.opt import OPT, Sizes
from opt_jax.partitioning import check_logical_axes, is_boxed, unbox

PRETRAIN = Path(__file__).parents[1] / "configs" / "pretrain.py"
W, F, FA, C, CODES, G = 30522, 2048, 768, 1600, 8192, 64
SIZES = Sizes(
    vocab_size=W, region_size=F, audio_size=FA, num_region_classes=C, num_codes=CODES, codes_per_image=G
)

COUNTS = {
    "tiny": 12_960_827,
    "small": 12_960_827,
    "manifest": 12_965_435,
    "base_paper": 235_203_514,
    "base": 238_753_211,
    "large": 559_906_235,
}


def stack(layers, d, mlp, cross, pre_norm):
    attention = 4 * (d * d + d)  # queries, keys, values, output
    feed_forward = 2 * d * mlp + mlp + d
    norms = 2 * d * (3 if cross else 2)
    return layers * (attention * (2 if cross else 1) + feed_forward + norms) + 2 * d * pre_norm


def expected(c):
    d, e = c.hidden_size, c.alignment_size
    words = W * d + c.max_text_positions * d + 3 * d + 2 * d  # words, positions, types, norm
    regions = F + (F * d + d) + 2 * d + (7 * d + d) + 2 * d + 2 * d  # mask, feature, norm, box, norm, norm
    frames = FA + (FA * d + d) + 2 * d + c.max_audio_positions * d + 2 * d
    frames += (c.frame_window * d * d + d) * (c.frame_window > 0)
    encoder = stack(c.num_layers, d, c.mlp_size, False, c.pre_norm)
    alignment = (
        (2 * d + 3 * (d * e + e) + 4 * d + 1) if c.num_alignment_layers else 0
    )  # norm, projections, agreement, temperature
    heads = 4 * (d * d + d + 2 * d) + W + F + FA + (d * (C + 1) + C + 1) + (5 * d + 5)
    decoders = 0
    for part, symbols, length, own in (
        (c.text_decoder, W, c.max_text_positions, 0),
        (c.image_decoder, CODES, G, CODES * d),
    ):
        decoders += stack(part.num_layers, d, part.mlp_size, True, c.pre_norm)
        decoders += d + length * d + 2 * d + symbols + own  # start, positions, norm, output bias, codes
    return words + regions + frames + encoder + alignment + heads + decoders


@pytest.mark.parametrize("variant", ["tiny", "small", "manifest", "base_paper", "base", "large"])
def test_every_variant_has_exactly_the_parameters_of_the_formula(variant):
    config = load(PRETRAIN, variant).model
    model = OPT(config.to_dict(), SIZES)
    batch = {
        "text_ids": jnp.zeros((1, 4), int),
        "text_valid": jnp.ones((1, 4), bool),
        "region_features": jnp.zeros((1, 2, F)),
        "region_boxes": jnp.zeros((1, 2, 7)),
        "region_valid": jnp.ones((1, 2), bool),
        "audio_features": jnp.zeros((1, 3, FA)),
        "audio_valid": jnp.ones((1, 3), bool),
    }
    codes = jnp.zeros((1, G), int)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), uncorrupted(batch), codes)["params"])
    check_logical_axes(params)
    assert all(is_boxed(leaf) for leaf in jax.tree.leaves(params, is_leaf=is_boxed))
    total = sum(leaf.size for leaf in jax.tree.leaves(unbox(params)))
    assert total == expected(config)
    assert total == COUNTS[variant]
