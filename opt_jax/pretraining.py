"""OPT's pre-training (OPT section 3.4) as a task: one corruption, one encoding, all objectives."""

import jax
import jax.numpy as jnp

from opt_jax.models.inputs import Statistics, standardise, uncorrupted
from opt_jax.models.opt import OPT, lengths_of
from opt_jax.objectives.contrast import alignment_contrast, masked_frame_contrast
from opt_jax.objectives.corruption import MODALITY, SAMPLE, TOKEN, Corruption, corrupt, rows_of, with_rows
from opt_jax.objectives.masked import accuracy, cross_entropy, squared_error
from opt_jax.objectives.matching import draw_donors, matching_loss
from opt_jax.train import Task

NAMES = ("text", "image", "audio")


def corruption_settings(config, tokenizer) -> Corruption:
    """The `objectives` part of a configuration as corruption settings."""
    o = config.objectives
    return Corruption(
        rows=(o.rows.token, o.rows.modality, o.rows.sample),
        mask_probability=o.mask_probability,
        word_drop_probability=o.word_drop_probability,
        drop_probability=tuple(o.modality_drop_probability[name] for name in NAMES),
        dropped_as_absent=o.dropped_as_absent,
        placeholder_lengths=tuple(o.placeholder_lengths[name] for name in NAMES),
        sample_drop_probability=o.sample_drop_probability,
        vocab_size=tokenizer.vocab_size,
        mask_id=tokenizer.mask_id,
        sep_id=tokenizer.sep_id,
        first_word_id=tokenizer.mask_id + 1,
    )


def pretraining_task(model: OPT, statistics: Statistics, corruption: Corruption, objectives) -> Task:
    """The task; `objectives` is that part of the configuration. One of weight 0 is not computed."""
    weights = {name: weight for name, weight in objectives.weights.items() if weight}

    def init(key, batch):
        batch = standardise(batch, statistics)
        return model.init(key, uncorrupted(batch), batch["image_codes"])["params"]

    def prepare(key, batch):
        batch = corrupt(key, standardise(batch, statistics), corruption)
        return noisy(jax.random.fold_in(key, 8), batch, objectives.audio_noise)

    def losses(params, batch, key, step):
        del step
        return forward(model, params, batch, key, weights, corruption.rows, objectives)

    def evaluate_losses(params, batch, key, step):
        del step
        return forward(model, params, batch, key, weights, corruption.rows, objectives, dropout=False)

    return Task(
        init=init,
        losses=losses,
        weights=weights,
        prepare=prepare,
        evaluate_losses=evaluate_losses,
        rows_per_group=sum(corruption.rows),
    )


def noisy(key, batch, deviation: float):
    """The batch with normal noise on the frames' features that the model sees, not on their targets.

    A speech encoder that was trained on the same few recordings is surer of these than of any others.
    """
    if not deviation:
        return batch
    features = batch["audio_features"]
    noise = deviation * jax.random.normal(key, features.shape, features.dtype)
    return batch | {"audio_features": features + jnp.where(batch["audio_valid"][..., None], noise, 0)}


def forward(model: OPT, params, batch, key, weights, rows, objectives, dropout: bool = True) -> dict:
    """One encoding of a corrupted batch [B, ...], and (sum, count) of each objective named in `weights`."""
    keys = list(jax.random.split(key, 5))
    if not dropout:
        keys = [None, keys[1], None, None, None]

    def apply(method, *args, **kwargs):
        return model.apply({"params": params}, *args, method=method, **kwargs)

    states, valid = apply("align", batch, key=keys[0])
    lengths = lengths_of(batch)
    t, v, _ = lengths
    seen = jnp.repeat(batch["fused"], jnp.array(lengths), axis=1, total_repeat_length=sum(lengths))
    seen = (valid & seen).at[:, 0].set(True)
    out, embeddings = {}, None
    if model.config["num_alignment_layers"]:
        embeddings = apply("embeddings", states, valid, lengths)
        embeddings = [embeddings[name] for name in NAMES]
    if "contrastive" in weights:
        # Of rows of every level: modalities are dropped and exchanged after the alignment layers, so here
        # each is still whole and beside its own.
        out["contrastive"] = alignment_contrast(
            embeddings, batch["clean"], batch["caption_key"], apply("temperature")
        )
    found = None
    if "matching" in weights:
        states, seen, found = mismatch(
            keys[1], batch, states, valid, seen, embeddings, lengths, rows, objectives
        )

    memory = apply("fuse", states, seen, lengths, key=keys[2])

    if {"mlm", "mvfr", "mrc", "mafr", "macl"} & set(weights):
        token = {name: rows_of(value, TOKEN, rows) for name, value in batch.items()}
        x = rows_of(memory, TOKEN, rows)
        if "mlm" in weights:
            out["mlm"] = cross_entropy(
                apply("word_logits", x[:, :t]), token["text_targets"], token["text_masked"]
            )
        regions, frames = x[:, t : t + v], x[:, t + v :]
        if "mvfr" in weights:
            predictions = apply("region_predictions", regions)
            out["mvfr"] = squared_error(predictions, token["region_targets"], token["region_masked"])
        if "mrc" in weights:
            logits = apply("region_class_logits", regions)
            out["mrc"] = cross_entropy(logits, token["region_classes"], token["region_masked"])
        if {"mafr", "macl"} & set(weights):
            predictions, masked = apply("frame_predictions", frames), token["audio_masked"]
            if "mafr" in weights:
                out["mafr"] = squared_error(predictions, token["audio_targets"], masked)
            if "macl" in weights:
                args = (predictions, token["audio_targets"], masked, token["audio_valid"])
                out["macl"] = masked_frame_contrast(*args, objectives.macl_temperature)

    if {"dtr", "dir"} & set(weights):
        row = {name: rows_of(value, MODALITY, rows) for name, value in batch.items()}
        x, x_valid = rows_of(memory, MODALITY, rows), rows_of(seen, MODALITY, rows)
        if "dtr" in weights:
            # Where a placeholder stands for the text, `text_valid` is the placeholder's; the target's own
            # length is `text_length`.
            targets = row["text_targets"][:, 1:]
            weight = (jnp.arange(1, t) < row["text_length"][:, None]) & row["present"][:, :1]
            history, kv = row["text_history"][:, 1:], apply("text_memory", x)
            logits = apply("text_logits", history, kv, x_valid, key=keys[3])
            out["dtr"] = cross_entropy(logits, targets, weight, objectives.label_smoothing)
            hidden = ~(row["fused"] & row["clean"])  # accuracy of what the decoder could not simply copy
            out["dtr_accuracy"] = accuracy(logits, targets, weight & hidden[:, :1])
        if "dir" in weights:
            # Regions that came ready, without pixels, have no codes (-1).
            weight = row["present"][:, 1:2] & (row["image_codes"] >= 0)
            codes = jnp.maximum(row["image_codes"], 0)
            logits = apply("image_logits", codes, apply("image_memory", x), x_valid, key=keys[4])
            out["dir"] = cross_entropy(logits, codes, weight, objectives.label_smoothing)
            hidden = ~(row["fused"] & row["clean"])
            out["dir_accuracy"] = accuracy(logits, codes, weight & hidden[:, 1:2])

    if "matching" in weights:
        logits = apply("matching_logits", rows_of(memory, SAMPLE, rows))
        label = rows_of(batch["matching_label"], SAMPLE, rows)
        defined = rows_of(batch["matching_defined"], SAMPLE, rows)
        out["matching"] = matching_loss(logits, label, defined, found)
        defined &= found[:, None]
        best = jnp.where(defined, logits, -jnp.inf).argmax(1)
        right = (best == label) & defined.any(1)
        out["matching_accuracy"] = right.sum().astype(jnp.float32), defined.any(1).sum().astype(jnp.float32)
    return out


def mismatch(key, batch, states, valid, seen, embeddings, lengths, rows, objectives):
    """Replaces modalities of the sample-level rows by other samples' aligned states.

    states [B, S, D], valid and seen [B, S]. Returns the new states and seen, and found [R]: rows whose donors
    exist.
    """
    replaced = rows_of(batch["replaced"], SAMPLE, rows)
    own_key = rows_of(batch["caption_key"], SAMPLE, rows)
    similarity = None
    if embeddings is not None and objectives.hard_negative_fraction:
        own = [jax.lax.stop_gradient(rows_of(z, SAMPLE, rows)) for z in embeddings]
        other = [jax.lax.stop_gradient(z) for z in embeddings]
        shown = rows_of(batch["fused"], SAMPLE, rows)
        similarity = []
        for m in range(3):
            anchors = sum(jnp.where(shown[:, a, None], own[a], 0) for a in range(3) if a != m)
            similarity.append(anchors @ other[m].T / objectives.hard_negative_temperature)
        similarity = jnp.stack(similarity, 1)
    donors, found = draw_donors(
        key,
        replaced,
        batch["clean"],
        (own_key, batch["caption_key"]),
        similarity,
        objectives.hard_negative_fraction,
    )
    new_states, new_seen, start = rows_of(states, SAMPLE, rows), rows_of(seen, SAMPLE, rows), 0
    for m, length in enumerate(lengths):
        first = start + (m == 0)  # [CLS] is nobody's
        part = slice(first, start + length)
        swap = replaced[:, m, None]
        new_seen = new_seen.at[:, part].set(jnp.where(swap, valid[donors[:, m], part], new_seen[:, part]))
        moved = jnp.where(swap[..., None], states[donors[:, m], part], new_states[:, part])
        new_states = new_states.at[:, part].set(moved)
        start += length
    return with_rows(states, new_states, SAMPLE, rows), with_rows(seen, new_seen, SAMPLE, rows), found
