"""The discrete VAE that turns 64 x 64 pictures into an 8 x 8 grid of codes (arXiv 2102.12092, section 2.1).

`tiny` is trained on Spoken Scenes in about two minutes on two CPU cores; `published` has the published shape.
"""

from ml_collections import ConfigDict

from opt_jax.configuration import choose


def get_config(variant: str = "tiny") -> ConfigDict:
    """ConfigDict(model, train) of a variant."""
    tiny = dict(
        vocab_size=256, group_count=3, n_hid=32, n_blk_per_group=1, n_init=32, patch_size=2, input_width=3
    )
    published = dict(
        vocab_size=8192, group_count=4, n_hid=256, n_blk_per_group=2, n_init=128, patch_size=1, input_width=7
    )
    model = choose(variant, dict(tiny=tiny, published=published))
    train = dict(steps=600, batch_size=32, learning_rate=1e-3, warmup_steps=50, decay="cosine")
    return ConfigDict(dict(model=model, train=train))
