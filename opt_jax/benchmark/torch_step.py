"""The pre-training losses and one optimizer step of the PyTorch side, on a batch that `corrupt` prepared.

It does the work of `opt_jax.pretraining.forward`: decoders on modality-level rows, masked-modelling heads on
token-level rows, matching on sample-level rows.
"""

from collections.abc import Mapping

import numpy as np

from opt_jax.benchmark.torch_opt import TorchOPT, copy_parameters
from opt_jax.objectives.corruption import MODALITY, SAMPLE, TOKEN

import torch  # isort: skip  (after torch_opt, whose error says how to install it)
from torch.nn import functional  # isort: skip

IGNORED = -100  # a label that functional.cross_entropy leaves out
LOWEST = -1e9


def describe() -> str:
    return f"torch {torch.__version__} with {torch.get_num_threads()} threads"


def to_torch(batch: Mapping, device="cpu", dtype=torch.float32) -> dict[str, torch.Tensor]:
    """The batch as tensors: integers as int64, floating numbers as `dtype`."""
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in batch.items()}
    kinds = {torch.bool: torch.bool, torch.float16: dtype, torch.float32: dtype, torch.float64: dtype}
    return {name: x.to(device, kinds.get(x.dtype, torch.int64)) for name, x in tensors.items()}


def rows_of(x, level: int, rows):
    """The rows of x [B, ...] of one corruption level; see `opt_jax.objectives.corruption.rows_of`."""
    start = sum(rows[:level])
    return x.unflatten(0, (-1, sum(rows)))[:, start : start + rows[level]].flatten(0, 1)


def cross_entropy(logits, labels, weight, smoothing=0.0):
    labels = labels.masked_fill(~weight, IGNORED).flatten()
    loss = functional.cross_entropy(logits.flatten(0, -2), labels, reduction="sum", label_smoothing=smoothing)
    return loss, weight.sum()


def squared_error(predictions, targets, weight):
    return (predictions - targets).square().mean(-1).mul(weight).sum(), weight.sum()


def unit(x):
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def masked_frame_contrast(predictions, targets, masked, valid, temperature):
    similarity = unit(predictions) @ unit(targets).transpose(1, 2) / temperature
    similarity = similarity.masked_fill(~valid[:, None], LOWEST)
    loss = similarity.logsumexp(-1) - similarity.diagonal(dim1=1, dim2=2)
    weight = masked & valid & (valid.sum(1, keepdim=True) > 1)
    return (loss * weight).sum(), weight.sum()


def alignment_contrast(embeddings, available, caption_key, temperature):
    same, total, count = caption_key[:, None] == caption_key, 0.0, 0
    for one in range(3):
        for other in range(one + 1, 3):
            logits = embeddings[one] @ embeddings[other].T / temperature
            rows = available[:, one] & available[:, other]
            for scores, columns in ((logits, available[:, other]), (logits.T, available[:, one])):
                scores = scores.masked_fill(~columns, LOWEST)
                loss = scores.logsumexp(1) - scores.masked_fill(~same, LOWEST).logsumexp(1)
                total, count = total + loss.masked_fill(~rows, 0).sum(), count + rows.sum()
    return total, count


def matching_loss(logits, label, defined, found):
    target = functional.one_hot(label, 5).to(logits.dtype)
    each = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    each = each.masked_fill(~(defined & found[:, None]), 0)
    number = defined.sum(1)
    return (each.sum(1) / number.clamp(min=1)).sum(), (number > 0).sum()


def mismatch(batch, states, valid, seen, donors, rows):
    """Sample-level rows with each replaced modality taken from its donor row; donors [R, 3]."""
    replaced = rows_of(batch["replaced"], SAMPLE, rows)
    states, seen = states.clone().unflatten(0, (-1, sum(rows))), seen.unflatten(0, (-1, sum(rows)))
    own, source = states[:, -rows[SAMPLE] :].flatten(0, 1), states.flatten(0, 1)
    own_seen, parts, seen_parts, start = seen[:, -rows[SAMPLE] :].flatten(0, 1), [own[:, :1]], [], 1
    seen_parts.append(own_seen[:, :1])  # [CLS] is nobody's
    for m, name in enumerate(("text", "region", "audio")):
        stop = start + batch[f"{name}_valid"].shape[1] - (m == 0)
        swap, donor = replaced[:, m, None], donors[:, m]
        parts.append(torch.where(swap[..., None], source[donor, start:stop], own[:, start:stop]))
        seen_parts.append(torch.where(swap, valid[donor, start:stop], own_seen[:, start:stop]))
        start = stop
    new = [torch.cat(x, 1).unflatten(0, (-1, rows[SAMPLE])) for x in (parts, seen_parts)]
    states = torch.cat([states[:, : -rows[SAMPLE]], new[0]], 1).flatten(0, 1)
    return states, torch.cat([seen[:, : -rows[SAMPLE]], new[1]], 1).flatten(0, 1)


def losses(network: TorchOPT, batch, donors, found, weights, rows, objectives) -> dict:
    """(sum, count) of each objective named in `weights`; donors [R, 3], found [R] are `draw_donors`'s."""
    out = {}
    states, valid, groups = network.align(batch)
    lengths = [batch[f"{name}_valid"].shape[1] for name in ("text", "region", "audio")]
    seen = valid & batch["fused"].repeat_interleave(torch.tensor(lengths, device=valid.device), 1)
    seen[:, 0] = True
    if "contrastive" in weights:
        embeddings = network.encoder.embeddings(states, valid, groups)
        temperature = network.encoder.temperature()
        out["contrastive"] = alignment_contrast(embeddings, batch["clean"], batch["caption_key"], temperature)
    if "matching" in weights:
        states, seen = mismatch(batch, states, valid, seen, donors, rows)
    memory = network.encoder.fuse(states, seen, groups)

    token = {name: rows_of(x, TOKEN, rows) for name, x in batch.items()}
    words, regions, frames = rows_of(memory, TOKEN, rows).split(lengths, 1)
    if "mlm" in weights:
        out["mlm"] = cross_entropy(network.word_logits(words), token["text_targets"], token["text_masked"])
    if "mvfr" in weights:
        predictions = network.region_predictions(regions)
        out["mvfr"] = squared_error(predictions, token["region_targets"], token["region_masked"])
    if "mrc" in weights:
        logits = network.region_class_logits(regions)
        out["mrc"] = cross_entropy(logits, token["region_classes"], token["region_masked"])
    if {"mafr", "macl"} & set(weights):
        args = network.frame_predictions(frames), token["audio_targets"], token["audio_masked"]
        if "mafr" in weights:
            out["mafr"] = squared_error(*args)
        if "macl" in weights:
            out["macl"] = masked_frame_contrast(*args, token["audio_valid"], objectives.macl_temperature)

    row = {name: rows_of(x, MODALITY, rows) for name, x in batch.items()}
    x, x_seen = rows_of(memory, MODALITY, rows), rows_of(seen, MODALITY, rows)
    if "dtr" in weights:
        targets, history = row["text_targets"][:, 1:], row["text_history"][:, 1:]
        places = torch.arange(1, targets.shape[1] + 1, device=targets.device)
        weight = (places < row["text_length"][:, None]) & row["present"][:, :1]
        logits = network.text_logits(history, x, x_seen)
        out["dtr"] = cross_entropy(logits, targets, weight, objectives.label_smoothing)
    if "dir" in weights:
        codes = row["image_codes"]
        weight = row["present"][:, 1:2].expand(codes.shape)
        logits = network.image_logits(codes, x, x_seen)
        out["dir"] = cross_entropy(logits, codes, weight, objectives.label_smoothing)

    if "matching" in weights:
        args = (rows_of(batch[name], SAMPLE, rows) for name in ("matching_label", "matching_defined"))
        out["matching"] = matching_loss(network.matching_logits(rows_of(memory, SAMPLE, rows)), *args, found)
    return out


def total_loss(sums: Mapping, weights: Mapping[str, float]):
    """sum over objectives of weight * sum / max(count, 1)."""
    return sum(weight * sums[name][0] / sums[name][1].clamp(min=1) for name, weight in weights.items())


def make_steps(config, sizes, weights, batch, donors, found, params, precisions, device):
    """step() -> total loss (float): forward, backward, clipping and AdamW on one corrupted batch.

    Args:
      config: a whole pre-training configuration. params: the parameter tree to start from.
      batch, donors, found: arrays of one corrupted batch, and its donors.
      precisions: of 'float32' and 'bfloat16' (autocast).
    Returns: {precision: step}; the steps share network and optimizer.
    """
    network = TorchOPT(config.model.to_dict(), sizes).to(device).train()
    copy_parameters(network, params)
    batch = to_torch(batch, device)
    donors, found = (torch.from_numpy(np.array(x)).to(device) for x in (donors, found))
    o, train = config.objectives, config.train
    rows = (o.rows.token, o.rows.modality, o.rows.sample)
    groups = {True: [], False: []}
    for parameter in network.parameters():
        groups[parameter.ndim >= 2].append(parameter)
    decay = {True: train.weight_decay, False: 0.0}
    optimizer = torch.optim.AdamW(
        [{"params": group, "weight_decay": decay[matrices]} for matrices, group in groups.items()],
        lr=1e-5,
        betas=(train.beta1, train.beta2),
        eps=train.epsilon,
        fused=True,
    )

    def step(precision):
        low = precision != "float32"
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=low):
            total = total_loss(losses(network, batch, donors, found, weights, rows, o), weights)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), train.clip_norm)
        optimizer.step()
        return float(total.detach())  # waits for the device

    return {precision: (lambda precision=precision: step(precision)) for precision in precisions}
