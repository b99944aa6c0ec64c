"""The discrete VAE that turns pictures into a grid of codes (arXiv 2102.12092, section 2.1 and appendix A).

`tiny` is trained on Spoken Scenes, 64 x 64 pictures to 8 x 8 codes, in 100 seconds on two CPU cores; expect
a PSNR of 23 to 24 dB on validation and fewer than 10 dead codes of 256.
`published` has the shape of the published model and the training that its paper describes.
"""

from ml_collections import ConfigDict

from opt_jax.configuration import choose


def get_config(variant: str = "tiny") -> ConfigDict:
    """ConfigDict(image_size, model, start, objective, train) of a variant."""
    return ConfigDict(choose(variant, dict(tiny=TINY, published=PUBLISHED)))


TINY = dict(
    image_size=64,
    model=dict(
        vocab_size=256, group_count=2, n_hid=64, n_blk_per_group=1, n_init=16, patch_size=4, input_width=3
    ),
    # An autoencoder first, whose bottleneck on `pictures` pictures is then cut into clusters.
    start=dict(
        pictures=192,
        train=dict(
            steps=1000, batch_size=16, learning_rate=3e-3, warmup_steps=10, decay="cosine", weight_decay=0.0
        ),
    ),
    objective=dict(
        temperature_end=1 / 16,
        temperature_steps=1800,
        kl_weight=1.0,
        kl_ramp_steps=100,
        min_log_scale=-1.5,
        logit_error_weight=10.0,
    ),
    train=dict(
        steps=1800, batch_size=16, learning_rate=1e-3, warmup_steps=20, decay="cosine", weight_decay=0.0
    ),
)

PUBLISHED = dict(
    image_size=256,
    model=dict(
        vocab_size=8192, group_count=4, n_hid=256, n_blk_per_group=2, n_init=128, patch_size=1, input_width=7
    ),
    start=dict(pictures=0, train=dict(steps=0)),  # random parameters
    objective=dict(
        temperature_end=1 / 16,
        temperature_steps=150_000,
        kl_weight=6.6,
        kl_ramp_steps=5000,
        min_log_scale=-20.0,  # no bound in practice
        logit_error_weight=0.0,
    ),
    train=dict(
        steps=1_200_000,
        batch_size=512,
        learning_rate=1e-4,
        decay="cosine",
        end_learning_rate_fraction=0.0125,
        beta2=0.999,
        epsilon=1e-8,
        weight_decay=1e-4,
        clip_norm=0.0,
    ),
)
