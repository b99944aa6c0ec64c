"""Trains a discrete VAE on the pictures of a source, measures it and freezes it.

At the published size this is the published training. The small one differs in four things. It starts from
an autoencoder and clusters (`dvae_start`). The temperature changes all through its few steps. The KL term has
the weight that it has in the bound itself, 1 instead of 6.6: the clusters keep the codes alive. And the
Laplace scale has a lower bound, and the mean's squared error is added: the likelihood alone is mostly about
the faint noise of empty ground and, being an absolute error, gives up what is small and rare.
"""

from functools import partial
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from opt_jax.data.triplet import Source, SourceError
from opt_jax.encoders.dvae import DiscreteVAE, decode, encode
from opt_jax.encoders.dvae_objectives import autoencoder_task, dvae_task
from opt_jax.encoders.dvae_pictures import PictureBatches, read_picture, write_before_after
from opt_jax.encoders.dvae_start import standardised, with_codebook
from opt_jax.encoders.frozen import save_frozen
from opt_jax.train import OwnRows, train

SHOWN = 32


def started(config: ConfigDict, batches: PictureBatches, directory: Path, seed: int, fingerprint: dict):
    """Parameters to start from (see `dvae_start`), or None where `config.start.train.steps` is 0."""
    if not config.start.train.steps:
        return None
    task = autoencoder_task(DiscreteVAE(**config.model))
    source, images = batches.from_step(0), []
    while sum(len(some) for some in images) < config.start.pictures:
        images.append(next(source)["images"])
    images = np.concatenate(images)[: config.start.pictures]
    fresh = jax.jit(task.init)(jax.random.key(seed), {"images": images[:1]})
    params = train(
        task,
        OwnRows(batches),
        config.start.train,
        directory,
        name="dvae_start",
        seed=seed,
        fingerprint=fingerprint,
        initial_params=standardised(fresh, images),
    )
    return with_codebook(params, images, seed)


def evaluate_dvae(params, images: np.ndarray) -> tuple[dict[str, float], np.ndarray]:
    """Scores on pictures uint8 [n, H, W, 3], and their reconstructions (uint8, same shape).

    Scores: psnr (dB, from the most probable codes), code_perplexity (exp of the entropy of the codes' use),
    dead_codes (codes that no picture uses).
    """
    codes = encode(params, images)
    after = decode(params, codes)
    vocab_size = params["encoder"]["output"]["kernel"].shape[-1]
    use = np.bincount(codes.ravel(), minlength=vocab_size) / codes.size
    error = np.mean(((after.astype(np.float64) - images) / 255) ** 2)
    used = use[use > 0]
    scores = {
        "psnr": float(-10 * np.log10(max(error, 1e-10))),
        "code_perplexity": float(np.exp(-np.sum(used * np.log(used)))),
        "dead_codes": int(vocab_size - len(used)),
    }
    return scores, after


def train_dvae(
    config: ConfigDict, train_source: Source, validation_source: Source, directory: Path, seed: int
) -> dict[str, float]:
    """Trains from scratch (or goes on from a checkpoint in `directory`), measures on validation and freezes.

    Args:
        config: image_size, model, start, objective, train; configs/encoders/dvae.py.
        directory: receives checkpoints, metrics.jsonl, before_after.png and the frozen encoder, whose config
            is the part `model` with `image_size` and `code_grid` (rows, columns).

    Returns:
        the scores of `evaluate_dvae` on `validation_source`.
    """
    model = DiscreteVAE(**config.model)
    if config.image_size % model.cell:
        raise ValueError(f"dvae config: image_size {config.image_size} is no multiple of {model.cell} (cell)")
    validation_picture = partial(read_picture, validation_source, size=config.image_size)
    rows = list(map(int, validation_source.rows_with("image")))
    if all(validation_picture(row) is None for row in rows):  # reads up to the first that can be used
        raise SourceError("no sample of the validation split has a picture, on which the dVAE is measured")
    directory = Path(directory)
    batches = PictureBatches(train_source, config.train.batch_size, config.image_size, seed)
    fingerprint = {
        "data": train_source.fingerprint(),
        **{part: config[part].to_dict() for part in ("model", "start", "objective")},
        "image_size": config.image_size,
    }
    params = train(
        dvae_task(model, config.objective),
        OwnRows(batches),
        config.train,
        directory,
        name="dvae",
        seed=seed,
        fingerprint=fingerprint,
        initial_params=started(config, batches, directory, seed, fingerprint),
    )
    params = jax.device_get(params)
    images = [image for image in map(validation_picture, rows) if image is not None]
    images = np.stack(images)
    metrics, after = evaluate_dvae(params, images)
    print("dvae: " + ", ".join(f"{name} {value:.2f}" for name, value in metrics.items()))
    write_before_after(directory / "before_after.png", images[:SHOWN], after[:SHOWN])
    grid = config.image_size // model.cell
    frozen = {**config.model.to_dict(), "image_size": config.image_size, "code_grid": [grid, grid]}
    save_frozen(directory, params, frozen, metrics)
    return metrics
