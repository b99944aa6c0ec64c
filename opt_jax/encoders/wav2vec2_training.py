"""Recipes of wav2vec 2.0 (arXiv 2006.11477, section 4): self-supervised pre-training, then letters by CTC.

The values are in `configs/encoders/wav2vec2.py`; the loop is `opt_jax.train`.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from opt_jax.data.triplet import Source
from opt_jax.encoders.frozen import save_frozen
from opt_jax.encoders.wav2vec2 import Wav2Vec2ForCTC, frame_count, model_input
from opt_jax.encoders.wav2vec2_batches import WaveformBatches
from opt_jax.encoders.wav2vec2_objectives import (
    contrastive_terms,
    ctc_terms,
    diversity_terms,
    feature_penalty,
    greedy_decode,
    sample_negatives,
    span_mask,
)
from opt_jax.encoders.wav2vec2_quantizer import Wav2Vec2ForPretraining
from opt_jax.evaluation.speech_recognition import error_rates
from opt_jax.train import OwnRows, Task, train


def ssl_task(config: ConfigDict) -> Task:
    """Pre-training by contrast over masked spans (section 3.2); `config` has `model` and `ssl`."""
    model, ssl = config.model, config.ssl
    module = Wav2Vec2ForPretraining(model, ssl)

    def prepare(key, batch):
        mask_key, negatives_key = jax.random.split(key)
        lengths = batch["lengths"]
        frames = jnp.arange(frame_count(batch["waveforms"].shape[1], model))
        mask = span_mask(
            mask_key, frames < frame_count(lengths, model)[:, None], ssl.mask_probability, ssl.mask_length
        )
        return {
            "waveforms": model_input(batch["waveforms"], lengths, model),
            "lengths": lengths,
            "mask": mask,
            "negatives": sample_negatives(negatives_key, mask, ssl.num_negatives),
        }

    def init(key, batch):
        return module.init(key, batch["waveforms"][:1], batch["lengths"][:1], None)["params"]

    def losses(params, batch, key, step):
        temperature = jnp.maximum(ssl.temperature_start * ssl.temperature_decay**step, ssl.temperature_end)
        dropout_key, gumbel_key = jax.random.split(key)
        output = module.apply(
            {"params": params},
            batch["waveforms"],
            batch["lengths"],
            batch["mask"],
            temperature,
            deterministic=False,
            rngs={"dropout": dropout_key, "gumbel": gumbel_key},
        )
        terms = contrastive_terms(
            output.context,
            output.targets,
            output.quantized.codes,
            batch["mask"],
            batch["negatives"],
            ssl.contrast_temperature,
        )
        terms["diversity"] = diversity_terms(output.quantized.probabilities, batch["mask"])
        terms["feature_penalty"] = feature_penalty(output.encoder.conv_features, output.encoder.frame_valid)
        return terms

    weights = {
        "contrast": 1.0,
        "diversity": ssl.diversity_weight,
        "feature_penalty": ssl.feature_penalty_weight,
    }
    return Task(init=init, losses=losses, weights=weights, prepare=prepare)


def ctc_task(config: ConfigDict) -> Task:
    """Fine-tuning on transcripts (section 3.3), with spans masked where `ctc.mask_probability` is not 0."""
    model, ctc = config.model, config.ctc
    module = Wav2Vec2ForCTC(model, ctc.freeze_feature_encoder)

    def prepare(key, batch):
        prepared = dict(batch, waveforms=model_input(batch["waveforms"], batch["lengths"], model))
        if ctc.mask_probability > 0:
            frames = jnp.arange(frame_count(batch["waveforms"].shape[1], model))
            valid = frames < frame_count(batch["lengths"], model)[:, None]
            prepared["mask"] = span_mask(key, valid, ctc.mask_probability, ctc.mask_length)
        return prepared

    def init(key, batch):
        return module.init(key, batch["waveforms"][:1], batch["lengths"][:1])["params"]

    def losses(params, batch, key, step):
        logits, valid = module.apply(
            {"params": params},
            batch["waveforms"],
            batch["lengths"],
            batch.get("mask"),
            deterministic=False,
            rngs={"dropout": key},
        )
        return ctc_terms(logits, valid, batch["labels"], batch["label_lengths"])

    return Task(init=init, losses=losses, weights={"ctc": 1.0}, prepare=prepare)


def evaluate_ssl(params, config: ConfigDict, batches: WaveformBatches, seed: int) -> dict[str, float]:
    """Contrast and use of the codebooks on held-out clips, choosing the most likely codes.

    `contrast_accuracy` and `contrast_chance` in percent over masked frames; `code_perplexity` in percent of
    the codebooks' entries: sum of exp(entropy) of each codebook's choices over all masked frames, by the
    number of entries.
    """
    module, task = Wav2Vec2ForPretraining(config.model, config.ssl), ssl_task(config)

    @jax.jit
    def measure(params, batch, key, row_valid):
        batch = task.prepare(key, batch)
        mask = batch["mask"] & row_valid[:, None]
        output = module.apply({"params": params}, batch["waveforms"], batch["lengths"], batch["mask"])
        codes = jax.nn.one_hot(output.quantized.codes, config.ssl.codebook_size) * mask[..., None, None]
        terms = contrastive_terms(
            output.context,
            output.targets,
            output.quantized.codes,
            mask,
            batch["negatives"],
            config.ssl.contrast_temperature,
        )
        return terms, codes.sum(axis=(0, 1))

    sums = None
    for number, (batch, indices) in enumerate(batches.once()):
        row_valid = np.arange(batches.batch_size) < len(indices)
        found = measure(params, batch, jax.random.fold_in(jax.random.key(seed), number), row_valid)
        sums = found if sums is None else jax.tree.map(jnp.add, sums, found)
    if sums is None:
        raise ValueError("validation source: no usable clip, so the contrast cannot be measured")
    terms, counts = jax.device_get(sums)
    mean = {name: float(total / max(count, 1)) for name, (total, count) in terms.items()}
    shares = counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1)
    entropy = -np.sum(shares * np.log(np.where(shares > 0, shares, 1)), axis=-1)
    return {
        "contrast": mean["contrast"],
        "contrast_accuracy": 100 * mean["contrast_accuracy"],
        "contrast_chance": 100 * mean["contrast_chance"],
        "code_perplexity": 100 * float(np.exp(entropy).sum()) / counts.size,
    }


def evaluate_ctc(params, config: ConfigDict, batches: WaveformBatches) -> dict[str, float]:
    """Word and character error rate in percent of greedy reading on held-out clips, and their number."""
    references, hypotheses = transcripts(params, config, batches)
    return {**error_rates(references, hypotheses), "clips": len(references)}


def transcripts(params, config: ConfigDict, batches: WaveformBatches) -> tuple[list[str], list[str]]:
    """(references, greedy hypotheses) of every usable clip."""
    module = Wav2Vec2ForCTC(config.model)

    @jax.jit
    def read(params, waveforms, lengths):
        logits, valid = module.apply(
            {"params": params}, model_input(waveforms, lengths, config.model), lengths
        )
        return logits, valid.sum(axis=1)

    references, hypotheses = [], []
    for batch, indices in batches.once():
        logits, counts = jax.device_get(read(params, batch["waveforms"], batch["lengths"]))
        hypotheses += greedy_decode(logits, counts, config.model.vocabulary)[: len(indices)]
        references += [batches.source.caption(i) for i in indices]
    return references, hypotheses


def train_wav2vec2(
    config: ConfigDict, train_source: Source, validation_source: Source, directory, seed: int
) -> dict:
    """Trains by `config.ssl`, then by `config.ctc`; writes the frozen encoder and returns its metrics.

    Either part may be disabled. With `config.ctc.compare_scratch` the same CTC training also starts from
    fresh parameters, and its error rates are reported as `scratch_*`; it is not kept. `directory` gets the
    checkpoints (training resumes), the logs and what `load_frozen` reads: {'wav2vec2': ..., 'ctc_head': ...}
    and the model's configuration.
    """
    if not (config.ssl.enabled or config.ctc.enabled):
        raise ValueError("wav2vec2: both ssl.enabled and ctc.enabled are false, there is nothing to train")
    directory = Path(directory)
    shape = dict(
        vocabulary=config.model.vocabulary,
        bucket_seconds=config.batches.bucket_seconds,
        pool_batches=config.batches.pool_batches,
        letters_per_second=config.batches.letters_per_second,
        speeds=config.batches.speeds,
    )
    size = config.batches.evaluation_batch_size
    held_out = {  # made first: whether there are clips for it should not be known only after the training
        part: WaveformBatches(
            validation_source, batch_size=size, seed=seed, transcribed=part == "ctc", **shape
        )
        for part in ("ssl", "ctc")
        if config[part].enabled
    }
    identity = {
        "data": train_source.fingerprint(),
        "model": config.model.to_dict(),
        "batches": config.batches.to_dict(),
    }
    metrics, params = {}, None

    def fit(task, part, name, initial_params=None, transcribed=True):
        batches = WaveformBatches(
            train_source, batch_size=part.train.batch_size, seed=seed, transcribed=transcribed, **shape
        )
        objective = {key: value for key, value in part.to_dict().items() if key != "train"}
        return train(
            task,
            OwnRows(batches),
            part.train,
            directory,
            name=name,
            seed=seed,
            fingerprint={**identity, "objective": objective},
            initial_params=initial_params,
        )

    def report(prefix, values):
        metrics.update({prefix + name: value for name, value in values.items()})
        print(
            f"wav2vec2 {prefix}",
            ", ".join(f"{name} {value:.4g}" for name, value in values.items()),
            flush=True,
        )

    if config.ssl.enabled:
        params = fit(ssl_task(config), config.ssl, "wav2vec2_ssl", transcribed=False)
        report("ssl_", evaluate_ssl(params, config, held_out["ssl"], seed))
    if config.ctc.enabled:
        start = None if params is None else {"wav2vec2": params["wav2vec2"]}
        params = fit(ctc_task(config), config.ctc, "wav2vec2_ctc", start)
        report("", evaluate_ctc(params, config, held_out["ctc"]))
        if config.ctc.compare_scratch and start is not None:
            scratch = fit(ctc_task(config), config.ctc, "wav2vec2_ctc_scratch")
            report("scratch_", evaluate_ctc(scratch, config, held_out["ctc"]))
    # Of the self-supervised half alone the quantizer too, which gives audio tokens.
    save_frozen(directory, jax.device_get(params), config.model.to_dict(), metrics)
    return metrics
