"""A start for the discrete VAE from which minutes of training suffice.

From random parameters the codes carry nothing at first, and before the decoder has learned to read them most
of them die: the published model took millions of steps. A small one can instead start as a plain
autoencoder, whose bottleneck is then cut into clusters, one for each code. Only initial values are set here;
the network and its objective stay as published.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from opt_jax.encoders.dvae import DiscreteVAE, map_pixels, model_of

LLOYD_STEPS = 10


def standardised(params, images: np.ndarray) -> dict:
    """Fresh parameters changed so that both ends of the network start at the statistics of the pictures.

    The first convolution acts as if its input had mean 0 and deviation 1 in each channel (except at the
    border); the last one's bias is the median logit of each channel and the log scale of the deviations from
    it, with a small kernel, so that the first gradients are about what differs between pictures.

    Args:
        params: of a fresh dVAE. images: uint8 [n, H, W, 3].
    """
    model = model_of(params)
    params = jax.tree.map(np.array, params)
    pixels = np.asarray(map_pixels(images.astype(np.float64) / 255))
    # patches list their pixels' channels one after another
    mean = np.tile(pixels.mean((0, 1, 2)), model.patch_size**2)
    deviation = np.tile(pixels.std((0, 1, 2)), model.patch_size**2)
    first, last = params["encoder"]["input"], params["decoder"]["output"]
    kernel = first["kernel"] / np.maximum(deviation, 1e-3)[:, None]
    first["bias"] = -np.einsum("hwio,i->o", kernel, mean).astype(np.float32)
    first["kernel"] = kernel.astype(np.float32)
    logits = np.log(pixels) - np.log1p(-pixels)
    median = np.median(logits, (0, 1, 2))
    log_scale = np.log(np.abs(logits - median).mean((0, 1, 2)) + 1e-3)
    bias = np.tile(np.concatenate([median, log_scale]), model.patch_size**2)
    last["bias"], last["kernel"] = bias.astype(np.float32), 0.3 * last["kernel"]
    return params


def with_codebook(params, images: np.ndarray, seed: int) -> dict:
    """An autoencoder's parameters turned into those of a dVAE with clusters as codes.

    The autoencoder passes e = W^T logits from encoder to decoder (W: the decoder's first convolution). The
    e of all cells of `images` are clustered by k-means. The centres become the new W, a code for each; the
    encoder's last convolution becomes the log probability, up to a constant, of each centre as the mean of a
    Gaussian with the variance found within clusters: it is linear in the encoder's features.

    Args:
        params: trained by `autoencoder_task`. images: uint8 [n, H, W, 3]; at least vocab_size cells in all.
    """
    model = model_of(params)
    params = jax.tree.map(np.array, params)
    features = np.concatenate([_features(model, params, image[None]) for image in images]).astype(np.float64)
    output, codebook = params["encoder"]["output"], params["decoder"]["input"]
    down = codebook["kernel"][0, 0].astype(np.float64)
    kernel, bias = output["kernel"][0, 0] @ down, output["bias"] @ down
    points = features @ kernel + bias
    centres = k_means(points, model.vocab_size, np.random.default_rng(seed))
    within = _distances(points, centres).min(1).mean()
    precision = points.shape[1] / max(within, 1e-12)
    output["kernel"] = (precision * kernel @ centres.T)[None, None].astype(np.float32)
    output["bias"] = (precision * (bias @ centres.T - 0.5 * (centres**2).sum(1))).astype(np.float32)
    codebook["kernel"] = centres[None, None].astype(np.float32)
    return params


def k_means(points: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Centres [count, D] of points [n, D], n >= count, first drawn apart from each other (k-means++)."""
    if len(points) < count:
        raise ValueError(f"{len(points)} points cannot make {count} clusters: give more pictures")
    chosen = [int(rng.integers(len(points)))]
    nearest = np.full(len(points), np.inf)
    while len(chosen) < count:
        nearest = np.minimum(nearest, ((points - points[chosen[-1]]) ** 2).sum(1))
        total = nearest.sum()
        probabilities = nearest / total if total > 0 else None  # all equal: any will do
        chosen.append(int(rng.choice(len(points), p=probabilities)))
    centres = points[chosen].astype(np.float64)
    for _ in range(LLOYD_STEPS):
        owner = _distances(points, centres).argmin(1)
        sums = np.zeros_like(centres)
        np.add.at(sums, owner, points)
        sizes = np.bincount(owner, minlength=count)
        centres[sizes > 0] = sums[sizes > 0] / sizes[sizes > 0, None]
    return centres


def _distances(points, centres):
    """Squared distances [n, count]."""
    return (points**2).sum(1, keepdims=True) - 2 * points @ centres.T + (centres**2).sum(1)


@partial(jax.jit, static_argnums=0)
def _features(model: DiscreteVAE, params, images):
    pixels = map_pixels(images.astype(jnp.float32) / 255)
    features = model.apply({"params": params}, pixels, method="features")
    return features.reshape(-1, features.shape[-1])
