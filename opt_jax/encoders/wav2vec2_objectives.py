"""Objectives of wav2vec 2.0 (arXiv 2006.11477, section 3): span masking, contrast, diversity, CTC, and greedy
reading.

Pure functions; everything random takes a key and runs on the device. Losses are (sum, count) pairs of float32
scalars (float64 in, float64 out). Letters: B batch, F frames, P width, G codebooks of K entries, U letters of
a transcript.
"""

from __future__ import annotations

from itertools import groupby

import jax
import jax.numpy as jnp
import numpy as np
import optax


def span_mask(
    key: jax.Array, frame_valid: jax.Array, probability: float, length: int, minimum: int = 2
) -> jax.Array:
    """Masks spans of `length` valid frames that may overlap (section 3.1, appendix A).

    frame_valid [B, F] bool, valid frames first -> mask [B, F] bool. A clip of n frames gets probability * n /
    length spans (the fraction is rounded at random), at least `minimum`, at most n // length, with distinct
    random starts; `probability` is 0.65 for the paper's p = 0.065 and length 10, of which overlaps leave
    about half of the frames.
    """
    batch, frames = frame_valid.shape
    start_key, round_key = jax.random.split(key)
    count = frame_valid.sum(axis=1)
    spans = jnp.floor(probability * count / length + jax.random.uniform(round_key, (batch,))).astype(
        jnp.int32
    )
    spans = jnp.minimum(jnp.maximum(spans, minimum), count // length)
    may_start = jnp.arange(frames) <= (count - length)[:, None]
    order = jnp.where(may_start, jax.random.uniform(start_key, (batch, frames)), 2.0)
    rank = jnp.argsort(jnp.argsort(order, axis=1), axis=1)
    starts = (may_start & (rank < spans[:, None])).astype(jnp.int32)
    begun = jnp.cumsum(starts, axis=1)
    ended = jnp.pad(begun, ((0, 0), (length, 0)))[:, :frames]
    return begun > ended


def sample_negatives(key: jax.Array, mask: jax.Array, number: int) -> jax.Array:
    """For each masked frame, `number` frames drawn uniformly from the *other* masked frames of the same clip.

    mask [B, F] bool -> frame indices [B, F, number] int32; meaningless where the frame is not masked or is
    alone.
    """
    count = mask.sum(axis=1)[:, None, None]
    positions = jnp.argsort(~mask, axis=1, stable=True)  # masked frames first, in order
    rank = jnp.cumsum(mask, axis=1)[..., None] - 1
    drawn = jax.random.uniform(key, (*mask.shape, number)) * jnp.maximum(count - 1, 1)
    drawn = jnp.minimum(drawn.astype(jnp.int32), jnp.maximum(count - 2, 0))
    drawn = drawn + (drawn >= rank)  # step over the frame itself
    drawn = jnp.minimum(drawn, mask.shape[1] - 1)
    return jnp.take_along_axis(positions[:, None, :], drawn, axis=2).astype(jnp.int32)


def cosine_similarities(x: jax.Array, y: jax.Array) -> jax.Array:
    """x [B, F, P] against y [B, E, P] of the same clip -> [B, F, E]."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    x, y = x.astype(dtype), y.astype(dtype)

    def unit(a):
        return a * jax.lax.rsqrt(jnp.maximum(jnp.square(a).sum(axis=-1, keepdims=True), 1e-16))

    return jnp.einsum("bfp,bep->bfe", unit(x), unit(y))


def contrastive_terms(
    context: jax.Array,
    targets: jax.Array,
    codes: jax.Array,
    mask: jax.Array,
    negatives: jax.Array,
    temperature: float,
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Eq. 3: tell a masked frame's quantized target from those of other masked frames of its clip.

    context, targets [B, F, P], codes [B, F, G], mask [B, F], negatives [B, F, n] frame indices -> (sum,
    count) of `contrast` (the loss), `contrast_accuracy` (target ranked first) and `contrast_chance` (what
    guessing would reach). Negatives with the target's own codes are the same vector and are left out, which
    is why chance is measured. All similarities of a clip are one matrix product, of which the drawn ones are
    picked.
    """
    similarity = cosine_similarities(context, targets) / temperature
    positive = jnp.diagonal(similarity, axis1=1, axis2=2)
    negative = jnp.take_along_axis(similarity, negatives, axis=2)
    drawn_codes = jax.vmap(lambda c, i: c[i])(codes, negatives)  # [B, F, n, G]
    equal = (drawn_codes == codes[:, :, None, :]).all(axis=-1)
    negative = jnp.where(equal, -jnp.inf, negative)
    loss = jax.nn.logsumexp(jnp.concatenate([positive[..., None], negative], axis=-1), axis=-1) - positive
    used = mask & (mask.sum(axis=1, keepdims=True) > 1)
    count = used.sum().astype(loss.dtype)

    def total(values):
        return jnp.where(used, values, 0).sum(dtype=loss.dtype)

    return {
        "contrast": (total(loss), count),
        "contrast_accuracy": (total(positive > negative.max(axis=-1)), count),
        "contrast_chance": (total(1 / (1 + (~equal).sum(axis=-1))), count),
    }


def code_perplexity(probabilities: jax.Array, mask: jax.Array) -> jax.Array:
    """exp(entropy) of the mean of probabilities [B, F, G, K] over masked frames [B, F] -> [G], 1 to K."""
    weights = mask[..., None, None].astype(probabilities.dtype)
    mean = (probabilities * weights).sum(axis=(0, 1)) / jnp.maximum(weights.sum(), 1)
    return jnp.exp(-jnp.where(mean > 0, mean * jnp.log(jnp.where(mean > 0, mean, 1)), 0).sum(axis=-1))


def diversity_terms(probabilities: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eq. 4 as released: (G K - sum of the codebooks' perplexities) / (G K), over all masked frames together.

    Not a mean over frames: with gradient accumulation it is that of each micro-batch, weighted by its frames.
    """
    entries = probabilities.shape[-2] * probabilities.shape[-1]
    count = mask.sum().astype(probabilities.dtype)
    return (entries - code_perplexity(probabilities, mask).sum()) / entries * count, count


def feature_penalty(features: jax.Array, frame_valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean square of the convolutions' output [B, F, C] over valid frames [B, F]: keeps it from growing."""
    features = features.astype(jnp.promote_types(features.dtype, jnp.float32))
    squares = jnp.where(frame_valid, jnp.square(features).mean(axis=-1), 0)
    return squares.sum(), frame_valid.sum().astype(squares.dtype)


def ctc_terms(logits: jax.Array, frame_valid: jax.Array, labels: jax.Array, label_lengths: jax.Array) -> dict:
    """Connectionist temporal classification with blank 0: (sum, count) of `ctc` and of `ctc_unalignable`.

    logits [B, F, K], frame_valid [B, F], labels [B, U] int, label_lengths [B]. A transcript that needs more
    frames than the clip has (letters, and a blank between equal ones) has probability zero: it is left out
    and counted as unalignable.
    """
    dtype = jnp.promote_types(logits.dtype, jnp.float32)
    label_valid = jnp.arange(labels.shape[1]) < label_lengths[:, None]
    repeats = ((labels[:, 1:] == labels[:, :-1]) & label_valid[:, 1:]).sum(axis=1)
    usable = (label_lengths + repeats <= frame_valid.sum(axis=1)) & (label_lengths > 0)
    losses = optax.ctc_loss(
        logits.astype(dtype), (~frame_valid).astype(dtype), labels, (~label_valid).astype(dtype), blank_id=0
    )
    return {
        "ctc": (jnp.where(usable, losses, 0).sum(), jnp.where(usable, label_lengths, 0).sum().astype(dtype)),
        "ctc_unalignable": (
            (~usable & (label_lengths > 0)).sum().astype(dtype),
            (label_lengths > 0).sum().astype(dtype),
        ),
    }


def encode_letters(text: str, vocabulary: tuple[str, ...]) -> list[int]:
    """Text -> letter indices in the vocabulary's case; '|' joins words, unknown characters part them."""
    letters = {letter: i for i, letter in enumerate(vocabulary)}
    text = text.lower() if "a" in letters else text.upper()
    words = "".join(c if c in letters and c != "|" else " " for c in text).split()
    return [letters[c] for c in "|".join(words)]


def greedy_decode(logits: np.ndarray, frame_counts: np.ndarray, vocabulary: tuple[str, ...]) -> list[str]:
    """Best letters, repeats merged, blanks (0) dropped: logits [B, F, K], frame_counts [B] -> B texts."""
    best = np.asarray(logits).argmax(axis=-1)
    texts = []
    for row, count in zip(best, np.asarray(frame_counts), strict=True):
        letters = [vocabulary[i] for i, _ in groupby(row[:count].tolist()) if i != 0]
        texts.append(" ".join("".join(letters).replace("|", " ").split()))
    return texts
