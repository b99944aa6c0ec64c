"""From a batch of cached features to the model's inputs: standardisation, and which modalities may be
seen."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from opt_jax.models.embeddings import AUDIO, IMAGE, TEXT


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Mean and deviation of the training cache's features: regions [F], audio positions [F] (tiled over
    stacked frames)."""

    region_mean: np.ndarray
    region_deviation: np.ndarray
    audio_mean: np.ndarray
    audio_deviation: np.ndarray


def standardise(batch: dict, statistics: Statistics, dtype=jnp.float32) -> dict:
    """The batch with float features of zero mean and unit deviation; padding stays zero."""
    out = dict(batch)
    for name in ("region", "audio"):
        mean, deviation = getattr(statistics, f"{name}_mean"), getattr(statistics, f"{name}_deviation")
        features = (batch[f"{name}_features"].astype(dtype) - mean) / deviation
        out[f"{name}_features"] = jnp.where(batch[f"{name}_valid"][..., None], features, 0).astype(dtype)
    return out


def uncorrupted(batch: dict, keep: tuple[bool, bool, bool] = (True, True, True)) -> dict:
    """Model inputs of a standardised batch with only the modalities of `keep` (text, image, audio)
    present."""
    cls_only = jnp.arange(batch["text_valid"].shape[1]) == 0
    return {
        "text_ids": batch["text_ids"],
        "text_valid": batch["text_valid"] & (keep[TEXT] | cls_only),
        "region_features": batch["region_features"],
        "region_boxes": batch["region_boxes"],
        "region_masked": jnp.zeros_like(batch["region_valid"]),
        "region_valid": batch["region_valid"] & keep[IMAGE],
        "audio_features": batch["audio_features"],
        "audio_masked": jnp.zeros_like(batch["audio_valid"]),
        "audio_valid": batch["audio_valid"] & keep[AUDIO],
    }
