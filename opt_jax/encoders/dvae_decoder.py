"""Trains a discrete VAE's decoder on, with the codes as they are.

The pair is trained on soft samples of the codes, while the codes themselves still change. What reads the
codes later gets the most probable ones; and a task that draws pictures can afford more steps than an encoder
that only a cache waits for. The codes stay the same, and with them every cache and model made of them.
"""

from pathlib import Path

import jax
import jax.numpy as jnp

from opt_jax.data.triplet import Source
from opt_jax.encoders.dvae import DiscreteVAE, map_pixels, model_of, unmap_pixels
from opt_jax.encoders.dvae_objectives import logit
from opt_jax.encoders.dvae_pictures import PictureBatches
from opt_jax.train import OwnRows, Task, train


def decoder_task(model: DiscreteVAE, encoder) -> Task:
    """Batches {"images": uint8 [B, H, W, 3]}; the parameters are the decoder's.

    Loss `logit_error`: squared error of the pixels' logits, averaged over pixels and channels, of pictures
    decoded from the most probable codes. Logged beside it: `squared_error`, of pixels in [0, 1].
    """

    def init(key, batch):
        pixels = map_pixels(batch["images"].astype(jnp.float32) / 255)
        return model.init(key, pixels, jax.nn.softmax)["params"]["decoder"]

    def losses(params, batch, key, step):
        del key, step
        pixels = map_pixels(batch["images"].astype(jnp.float32) / 255)
        codes = model.apply({"params": {"encoder": encoder}}, pixels, method="logits").argmax(-1)
        one_hot = jax.nn.one_hot(codes, model.vocab_size)
        mean = model.apply({"params": {"decoder": params}}, one_hot, method="reconstruct")[..., :3]
        off = unmap_pixels(jax.nn.sigmoid(mean)) - unmap_pixels(pixels)
        rows = len(pixels)
        return {
            "logit_error": (jnp.sum(jnp.mean((logit(pixels) - mean) ** 2, (1, 2, 3))), rows),
            "squared_error": (jnp.sum(jnp.mean(off**2, (1, 2, 3))), rows),
        }

    return Task(init=init, losses=losses, weights={"logit_error": 1.0})


def train_decoder(params, config, image_size: int, source: Source, directory: Path, seed: int, digest: str):
    """The parameters of a dVAE with its decoder trained on by `config`, a `train` section.

    Goes on from a checkpoint in `directory`. image_size: of the pictures that it takes. digest: of `params`.
    """
    batches = PictureBatches(source, config.batch_size, image_size, seed)
    decoder = train(
        decoder_task(model_of(params), params["encoder"]),
        OwnRows(batches),
        config,
        directory,
        name="picture_decoder",
        seed=seed,
        fingerprint={"dvae": digest, "data": source.fingerprint()},
        initial_params=params["decoder"],
    )
    return {"encoder": params["encoder"], "decoder": jax.device_get(decoder)}
