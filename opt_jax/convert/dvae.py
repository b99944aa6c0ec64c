"""The published discrete VAE (arXiv 2102.12092): encoder.pkl and decoder.pkl, each a pickled torch module.

The sizes are read off the arrays. Pictures of `IMAGE_SIZE` pixels give the 8 x 8 codes that OPT writes.
"""

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from opt_jax.convert.table import Row, shapes_of
from opt_jax.encoders.dvae import DiscreteVAE

PARTS = ("encoder", "decoder")
IMAGE_SIZE = 64


def configuration(arrays: Mapping[str, np.ndarray]) -> ConfigDict:
    """The configuration that `load_frozen` hands to the cache, from arrays named encoder.* and decoder.*.

    Raises: ValueError: an array that tells a size is missing.
    """
    sizes = {}
    for name, part in (("encoder", "input"), ("encoder", "output"), ("decoder", "input")):
        key = f"{name}.blocks.{part}.conv.w" if part == "output" else f"{name}.blocks.{part}.w"
        if key not in arrays or arrays[key].ndim != 4:
            raise ValueError(f"there is no convolution {key}; is it the discrete VAE of the dall-e package?")
        sizes[f"{name}.{part}"] = arrays[key].shape
    blocks = [re.match(r"encoder\.blocks\.group_(\d+)\.block_(\d+)\.", name) for name in arrays]
    blocks = [(int(match[1]), int(match[2])) for match in blocks if match]
    if not blocks:
        raise ValueError("there is no encoder.blocks.group_1.block_1; is it the discrete VAE of dall-e?")
    groups, per_group = (max(numbers) for numbers in zip(*blocks, strict=True))
    grid = IMAGE_SIZE // 2 ** (groups - 1)
    return ConfigDict(
        dict(
            vocab_size=sizes["encoder.output"][0],
            group_count=groups,
            n_hid=sizes["encoder.input"][0],
            n_blk_per_group=per_group,
            n_init=sizes["decoder.input"][0],
            patch_size=1,
            input_width=sizes["encoder.input"][2],
            image_size=IMAGE_SIZE,
            code_grid=(grid, grid),
        )
    )


def shapes(config: ConfigDict) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters by path."""
    fields = config.to_dict()
    model = DiscreteVAE(**{name: fields[name] for name in DiscreteVAE.__dataclass_fields__ if name in fields})
    pixels = jnp.zeros((1, config.image_size, config.image_size, 3))
    codes = jnp.zeros((1, *config.code_grid, config.vocab_size))

    def init():
        key = jax.random.key(0)
        encoder = model.init(key, pixels, method="logits")["params"]
        return encoder | model.init(key, codes, method="reconstruct")["params"]

    return shapes_of(jax.eval_shape(init))


def rows() -> list[Row]:
    """The table: torch's [out, in, height, width] becomes [height, width, in, out]."""

    def kernel(weight):
        return weight.transpose(2, 3, 1, 0)

    table = []
    for part in PARTS:
        ends = rf"{part}\.blocks\.(input|output)\.(?:conv\.)?"
        block = rf"{part}\.blocks\.group_(\d+)\.block_(\d+)\.(?:res_path\.)?(conv_\d|id_path)\."
        to = rf"{part}/group_\1_block_\2/\3"
        table += [
            Row(ends + "w", rf"{part}/\1/kernel", kernel),
            Row(ends + "b", rf"{part}/\1/bias"),
            Row(block + "w", f"{to}/kernel", kernel),
            Row(block + "b", f"{to}/bias"),
        ]
    return table
