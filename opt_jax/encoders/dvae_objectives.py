"""The objective of the discrete VAE (arXiv 2102.12092, section 2.1 and appendix A.2-A.3).

The bound on the likelihood: pictures are reconstructed from Gumbel-softmax samples of the codes under a
logit-Laplace density, and each cell's distribution over the codes is drawn to the uniform one.
"""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from opt_jax.encoders.dvae import DiscreteVAE, map_pixels, unmap_pixels
from opt_jax.train import Task


def logit(pixels):
    """log(x / (1 - x)), for x in (0, 1)."""
    return jnp.log(pixels) - jnp.log1p(-pixels)


def logit_laplace_log_density(pixels, mean, log_scale):
    """Natural log of the density at `pixels` in (0, 1) of the sigmoid of a Laplace variable (appendix A.3).

    f(x | mu, b) = exp(-|logit(x) - mu| / b) / (2 b x (1 - x)), element by element.
    """
    jacobian = jnp.log(pixels) + jnp.log1p(-pixels)
    return -jnp.abs(logit(pixels) - mean) * jnp.exp(-log_scale) - log_scale - jnp.log(2.0) - jacobian


def kl_to_uniform(logits):
    """KL(softmax(logits) || uniform) in nats: [..., vocab_size] -> [...]."""
    log_probs = jax.nn.log_softmax(logits)
    return jnp.sum(jnp.exp(log_probs) * log_probs, -1) + jnp.log(logits.shape[-1])


def relaxed_codes(key, logits, temperature):
    """A Gumbel-softmax sample [..., vocab_size], nearly one-hot for a small temperature."""
    return jax.nn.softmax((logits + jax.random.gumbel(key, logits.shape, logits.dtype)) / temperature)


def temperature(step, objective):
    """From 1 to `temperature_end` along half a cosine of `temperature_steps` steps, constant after it."""
    share = jnp.clip(step / objective.temperature_steps, 0, 1)
    end = objective.temperature_end
    return end + (1 - end) * 0.5 * (1 + jnp.cos(jnp.pi * share))


def kl_weight(step, objective):
    """Grows linearly to `kl_weight` in `kl_ramp_steps` steps."""
    return objective.kl_weight * jnp.clip(step / objective.kl_ramp_steps, 0, 1)


def _mapped(batch):
    return map_pixels(batch["images"].astype(jnp.float32) / 255)


def _squared_error(images, mean):
    """Sum over rows of the mean squared error of pixels in [0, 1]."""
    error = unmap_pixels(jax.nn.sigmoid(mean)) - images.astype(jnp.float32) / 255
    return jnp.sum(jnp.mean(error**2, (1, 2, 3)))


def dvae_task(model: DiscreteVAE, objective: ConfigDict) -> Task:
    """The task of training on batches {"images": uint8 [B, H, W, 3]}.

    Losses, in nats per pixel and channel: `reconstruction`, and `kl` = weight(step) * sum over cells of
    `kl_to_uniform`. `objective.min_log_scale` bounds the predicted log scale from below. With a
    `objective.logit_error_weight` the squared error of the mean, as in `autoencoder_task`, is added under
    that weight: `logit_error`. Logged beside them: `kl_per_code` (nats), `squared_error`, `temperature`.
    """

    def init(key, batch):
        return model.init(key, _mapped(batch), jax.nn.softmax)["params"]

    def losses(params, batch, key, step):
        heat = temperature(step, objective)
        pixels = _mapped(batch)
        logits, output = model.apply(
            {"params": params}, pixels, lambda logits: relaxed_codes(key, logits, heat)
        )
        mean, log_scale = jnp.split(output, 2, -1)
        density = logit_laplace_log_density(pixels, mean, jnp.maximum(log_scale, objective.min_log_scale))
        divergence = jnp.sum(kl_to_uniform(logits), (1, 2))
        rows, cells = len(pixels), logits.shape[1] * logits.shape[2]
        weight = kl_weight(step, objective) / pixels[0].size
        return {
            "reconstruction": (-jnp.sum(jnp.mean(density, (1, 2, 3))), rows),
            "kl": (weight * jnp.sum(divergence), rows),
            "logit_error": (jnp.sum(jnp.mean((logit(pixels) - mean) ** 2, (1, 2, 3))), rows),
            "kl_per_code": (jnp.sum(divergence) / cells, rows),
            "squared_error": (_squared_error(batch["images"], mean), rows),
            "temperature": (heat * rows, rows),
        }

    weights = {"reconstruction": 1.0, "kl": 1.0}
    if objective.logit_error_weight:
        weights["logit_error"] = objective.logit_error_weight
    return Task(init=init, losses=losses, weights=weights)


def autoencoder_task(model: DiscreteVAE) -> Task:
    """The same network without discrete codes: the decoder reads the logits themselves.

    Loss `logit_error`: squared error of the pixels' logits, averaged over pixels and channels.
    """

    def init(key, batch):
        return model.init(key, _mapped(batch), jax.nn.softmax)["params"]

    def losses(params, batch, key, step):
        pixels = _mapped(batch)
        _, output = model.apply({"params": params}, pixels, lambda logits: logits)
        mean = output[..., :3]
        error = jnp.sum(jnp.mean((logit(pixels) - mean) ** 2, (1, 2, 3)))
        rows = len(pixels)
        return {
            "logit_error": (error, rows),
            "squared_error": (_squared_error(batch["images"], mean), rows),
        }

    return Task(init=init, losses=losses, weights={"logit_error": 1.0})
