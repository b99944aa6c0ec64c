"""Trains a detector from the boxes of a source, measures it and freezes it."""

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from opt_jax.data.triplet import Source
from opt_jax.encoders.faster_rcnn import detect, from_config
from opt_jax.encoders.faster_rcnn_metrics import Regions, average_precision, recall_and_class_accuracy
from opt_jax.encoders.faster_rcnn_objectives import Sampling, losses
from opt_jax.encoders.faster_rcnn_pictures import DetectorBatches, detector_batch, read_example
from opt_jax.encoders.frozen import save_frozen
from opt_jax.encoders.resnet import CALIBRATION, with_calibration
from opt_jax.train import OwnRows, Task, train


def detector_task(config: ConfigDict) -> Task:
    """The training task of `config` (parts model, sampling, loss_weights)."""
    model = from_config(config.model)
    sampling = Sampling(**config.sampling)

    def init(key, batch):
        return model.init(key, batch["images"], batch["boxes"])["params"]

    def task_losses(params, batch, key, step):
        return losses(model, params, batch, key, sampling)

    return Task(init=init, losses=task_losses, weights=dict(config.loss_weights))


def calibrated_params(config: ConfigDict, batch: dict, seed: int) -> dict:
    """Fresh parameters whose frozen norms hold the statistics of `batch`, layer after layer.

    res5 is calibrated on the true boxes, padding included (empty boxes: a small share, kept simple).
    """
    model = from_config(config.model)

    @jax.jit
    def make(key, images, boxes):
        params = model.init(key, images, boxes)["params"]
        _, recorded = model.apply({"params": params}, images, boxes, mutable=[CALIBRATION])
        return with_calibration(params, recorded[CALIBRATION])

    return make(jax.random.key(seed), batch["images"], batch["boxes"])


def evaluate_detector(params, model: Mapping, source: Source, batch_size: int) -> dict[str, float]:
    """Scores of a detector, `model` being its configuration, on all of a source.

    Returns:
      ap50: mean average precision at overlap 0.5 of the max_regions best regions of every picture;
      recall50, class_accuracy: of the objects covered by the regions that extraction would keep, and
      how many of these are of the right class; regions: kept a picture, on average.
    """
    everything = {**model, "confidence_threshold": 0.0}
    found, kept, truth = [], [], []
    for start in range(0, len(source), batch_size):
        # The last batch is filled up with repeated pictures: one compilation.
        rows = [min(i, len(source) - 1) for i in range(start, start + batch_size)]
        samples = [read_example(source, i) for i in rows]
        most = max(len(sample.boxes) for sample in samples)
        batch = detector_batch(samples, model["min_side"], model["max_side"], most)
        regions = jax.device_get(detect(params, batch["images"], everything, batch["sizes"]))
        for row in range(min(batch_size, len(source) - start)):
            scores, valid = regions["scores"][row], regions["valid"][row]
            best = np.arange(len(scores)) < model["min_regions"]
            chosen = (scores >= model["confidence_threshold"]) | best
            for into, mask in ((found, valid), (kept, valid & chosen)):
                into.append(Regions(regions["boxes"][row, mask], regions["classes"][row, mask], scores[mask]))
            real = batch["classes"][row] > 0
            truth.append(Regions(batch["boxes"][row, real], batch["classes"][row, real]))
    recall, accuracy = recall_and_class_accuracy(kept, truth)
    return {
        "ap50": average_precision(found, truth)[0],
        "recall50": recall,
        "class_accuracy": accuracy,
        "regions": float(np.mean([len(regions.classes) for regions in kept])),
    }


def train_detector(
    config: ConfigDict, train_source: Source, validation_source: Source, directory: Path, seed: int
) -> dict[str, float]:
    """Trains from scratch (or goes on from a checkpoint in `directory`), measures on validation and freezes.

    Args:
      config: model, sampling, loss_weights, train, max_objects; configs/encoders/detector.py.
      directory: receives checkpoints, metrics.jsonl and the frozen encoder, whose config is the part `model`.

    Returns:
      the scores of `evaluate_detector` on `validation_source`.
    """
    classes = len(train_source.class_names)
    if config.model.num_classes != classes:
        raise ValueError(
            f"detector config: num_classes is {config.model.num_classes}, but the source has {classes}"
        )
    batch_size = config.train.batch_size
    sizes = (config.model.min_side, config.model.max_side, config.max_objects)
    batches = DetectorBatches(train_source, batch_size, sizes, seed)
    params = train(
        detector_task(config),
        OwnRows(batches),
        config.train,
        directory,
        name="detector",
        seed=seed,
        fingerprint={
            "data": train_source.fingerprint(),
            **{part: config[part].to_dict() for part in ("model", "sampling", "loss_weights")},
        },
        initial_params=calibrated_params(config, next(batches.from_step(0)), seed),
    )
    metrics = evaluate_detector(params, config.model, validation_source, batch_size)
    print("detector: " + ", ".join(f"{name} {value:.3f}" for name, value in metrics.items()))
    save_frozen(directory, params, config.model.to_dict(), metrics)
    return metrics
