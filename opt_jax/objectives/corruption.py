"""What a batch loses before the model sees it (OPT section 3.4): tokens, modalities, partners.

Runs on the device, once per step, from a key alone. The rows of a batch are dealt out in groups of
`sum(rows)`: in each group the first `rows[0]` are corrupted at the token level, the next `rows[1]` at the
modality level, the last `rows[2]` at the sample level. The order of the data is random, so this is a
stratified draw; the losses and decoders of a level then run on its rows only (`rows_of`), whatever the mesh.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opt_jax.models.embeddings import AUDIO, IMAGE, TEXT

TOKEN, MODALITY, SAMPLE = 0, 1, 2
SUBSETS = np.array([[bool(bits >> m & 1) for m in range(3)] for bits in range(8)])  # [8, 3]
WHOLE_PICTURE = (0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0)  # x1, y1, x2, y2, w, h, w * h
Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Corruption:
    """Settings. Triples are in the order text, image, audio."""

    rows: tuple[int, int, int]  # of each group: token, modality, sample level
    mask_probability: float
    word_drop_probability: float  # of the words before the one that the text decoder is to write
    drop_probability: tuple[float, float, float]
    dropped_as_absent: float  # the other dropped modalities are shown as mask tokens
    # How many; constant, so that the length of what is to be said does not leak.
    placeholder_lengths: tuple[int, int, int]
    sample_drop_probability: float  # that a matching row loses one modality, so that pairs are learned too
    vocab_size: int
    mask_id: int
    sep_id: int
    first_word_id: int  # ids below are special and never drawn as random words


def rows_of(x: jax.Array, level: int, rows: tuple[int, int, int]) -> jax.Array:
    """The rows of x [B, ...] that belong to a level: [B * rows[level] / sum(rows), ...]."""
    grouped = x.reshape(len(x) // sum(rows), sum(rows), *x.shape[1:])  # not -1: x may be empty
    start = sum(rows[:level])
    return grouped[:, start : start + rows[level]].reshape(len(grouped) * rows[level], *x.shape[1:])


def with_rows(x: jax.Array, new: jax.Array, level: int, rows: tuple[int, int, int]) -> jax.Array:
    """x [B, ...] with the rows of a level replaced by `new`, as `rows_of` returned them."""
    grouped = x.reshape(len(x) // sum(rows), sum(rows), *x.shape[1:])  # not -1: x may be empty
    start = sum(rows[:level])
    grouped = grouped.at[:, start : start + rows[level]].set(
        new.reshape(grouped.shape[0], rows[level], *x.shape[1:])
    )
    return grouped.reshape(x.shape)


def corrupt(key: jax.Array, batch: Batch, c: Corruption) -> Batch:
    """Corrupts one batch.

    Args:
      batch: text_ids [B, T], text_valid, region_features [B, V, F], region_boxes, region_valid,
        audio_features [B, A, F], audio_valid, present [B, 3]; features standardised. B must be a multiple of
        sum(c.rows).
    Returns: the batch with the model's inputs replaced and, added:
      text_targets, region_targets, audio_targets: the inputs as they were.
      text_history [B, T]: the text as its decoder reads it, with dropped words masked (Bowman et al., 2016,
        section 3.1): a decoder that knows the captions by heart would not look at what it describes.
      text_masked [B, T]: words to predict, in token-level rows. region_masked [B, V], audio_masked [B, A]:
        features to hide, in token-level rows and placeholders.
      fused [B, 3]: modalities that the fusion layers may see. A modality dropped as absent is still aligned,
        alone, so that the contrast can use it.
      clean [B, 3]: modalities that are present and nowhere masked.
      matching_label [B], matching_defined [B, 5], replaced [B, 3]: what matching asks for (zero rows at other
        levels).
    """
    size = batch["present"].shape[0]
    group = sum(c.rows)
    if size % group:
        raise ValueError(
            f"a batch of {size} rows does not divide into groups of {group} (granularity {c.rows})"
        )
    check_placeholders(batch, c)
    level = jnp.tile(jnp.repeat(jnp.arange(3), jnp.array(c.rows), total_repeat_length=group), size // group)
    keys = jax.random.split(key, 8)
    present = batch["present"]

    # Token level: mask tokens of one present modality.
    choice = jax.random.categorical(keys[0], jnp.where(present, 0.0, -jnp.inf))
    hit = (level == TOKEN)[:, None] & (choice[:, None] == jnp.arange(3)) & present
    words = (
        batch["text_valid"] & (jnp.arange(batch["text_ids"].shape[1]) > 0) & (batch["text_ids"] != c.sep_id)
    )
    masked = [
        draw_masks(keys[1], words & hit[:, TEXT, None], c.mask_probability),
        draw_masks(keys[2], batch["region_valid"] & hit[:, IMAGE, None], c.mask_probability),
        draw_masks(keys[3], batch["audio_valid"] & hit[:, AUDIO, None], c.mask_probability),
    ]

    # Modality level: drop whole modalities, half of them as absence, half as a run of mask tokens.
    dropped = draw_dropped(keys[4], present, c.drop_probability) & (level == MODALITY)[:, None]
    shown = dropped & ~jax.random.bernoulli(keys[5], c.dropped_as_absent, dropped.shape)

    # Sample level.
    lost, label, defined, replaced = draw_matching(keys[6], present, c.sample_drop_probability)
    sample = (level == SAMPLE)[:, None]
    dropped |= lost & sample

    out = dict(batch)
    out["text_length"] = batch["text_valid"].sum(1)
    out["text_targets"], out["region_targets"] = batch["text_ids"], batch["region_features"]
    out["audio_targets"] = batch["audio_features"]
    forgotten = jax.random.bernoulli(jax.random.fold_in(key, 9), c.word_drop_probability, words.shape)
    out["text_history"] = jnp.where(words & forgotten, c.mask_id, batch["text_ids"])
    out["text_ids"] = mask_words(keys[7], batch["text_ids"], masked[TEXT], c)
    out["region_masked"], out["audio_masked"] = masked[IMAGE], masked[AUDIO]
    out["text_masked"] = masked[TEXT]
    for m, name in enumerate(("text", "region", "audio")):
        place = shown[:, m, None]
        length = c.placeholder_lengths[m] + (m == TEXT)  # [CLS] stays
        run = jnp.arange(batch[f"{name}_valid"].shape[1]) < length
        run = jnp.broadcast_to(run, batch[f"{name}_valid"].shape)
        out[f"{name}_valid"] = jnp.where(place, run, batch[f"{name}_valid"])
        if m == TEXT:
            masks = jnp.where(run, c.mask_id, 0).at[:, 0].set(batch["text_ids"][:, 0])
            out["text_ids"] = jnp.where(place, masks, out["text_ids"])
        else:
            out[f"{name}_masked"] = jnp.where(place, run, out[f"{name}_masked"])
    # Of a box of zeros the embedder would make a constant vector, whose normalisation has a huge gradient.
    whole = jnp.array(WHOLE_PICTURE, batch["region_boxes"].dtype)
    out["region_boxes"] = jnp.where(shown[:, IMAGE, None, None], whole, batch["region_boxes"])
    out["fused"] = (present & ~dropped) | shown
    out["clean"] = present & ~shown & ~hit
    out["matching_label"] = jnp.where(sample[:, 0], label, 0)
    out["matching_defined"] = defined & sample
    out["replaced"] = replaced & sample
    return out


def check_placeholders(batch: Batch, c: Corruption) -> None:
    """Raises ValueError where a batch is too short for a placeholder: cut, it would tell a length."""
    for m, (name, field) in enumerate((("text", "text"), ("image", "region"), ("audio", "audio"))):
        positions = batch[f"{field}_valid"].shape[1] - (m == TEXT)
        if c.placeholder_lengths[m] > positions:
            raise ValueError(
                f"a placeholder of {c.placeholder_lengths[m]} {name} positions does not fit into a batch of"
                f" {positions}; shorten placeholder_lengths or lengthen the shortest batches"
            )


def draw_masks(key: jax.Array, candidates: jax.Array, probability: float) -> jax.Array:
    """Masks each candidate [B, N] with a probability; at least one in a row that has any."""
    draw = jnp.where(candidates, jax.random.uniform(key, candidates.shape), 2.0)
    return candidates & ((draw < probability) | (draw == draw.min(1, keepdims=True)))


def mask_words(key: jax.Array, ids: jax.Array, masked: jax.Array, c: Corruption) -> jax.Array:
    """BERT's 80/10/10: of the masked words [B, T], 80 % become [MASK], 10 % a random word, 10 % stay."""
    draw_key, word_key = jax.random.split(key)
    draw = jax.random.uniform(draw_key, ids.shape)
    words = jax.random.randint(word_key, ids.shape, c.first_word_id, c.vocab_size)
    return jnp.where(masked & (draw < 0.8), c.mask_id, jnp.where(masked & (draw >= 0.9), words, ids))


def draw_dropped(key: jax.Array, present: jax.Array, probability: tuple[float, float, float]) -> jax.Array:
    """Which modalities [B, 3] are dropped.

    Each present one independently, given that at least one goes and one stays. A row with a single modality
    keeps it.
    """
    p = jnp.array(probability)
    log_prior = jnp.where(SUBSETS, jnp.log(p), jnp.log1p(-p)).sum(1)  # [8]
    within = ~(SUBSETS[None] & ~present[:, None]).any(-1)
    proper = SUBSETS.any(1)[None] & ~(SUBSETS[None] == present[:, None]).all(-1)
    allowed = within & jnp.where((present.sum(1) > 1)[:, None], proper, ~SUBSETS.any(1)[None])
    subset = jax.random.categorical(key, jnp.where(allowed, log_prior, -jnp.inf))
    return jnp.asarray(SUBSETS)[subset]


def draw_matching(key: jax.Array, present: jax.Array, drop_probability: float):
    """Labels of the sample level (OPT section 3.4; classes 0 all, 1 V-A, 2 T-A, 3 T-V, 4 none).

    A row with all three modalities first loses one with `drop_probability`. Among the classes that the
    remaining ones define (all five; for a pair its own class and 4) one is drawn evenly.
    Returns: lost [B, 3], label [B], defined [B, 5], replaced [B, 3].
    """
    size = present.shape[0]
    keys = jax.random.split(key, 4)
    loses = present.all(1) & jax.random.bernoulli(keys[0], drop_probability, (size,))
    lost = jax.nn.one_hot(jax.random.randint(keys[1], (size,), 0, 3), 3, dtype=bool) & loses[:, None]
    left = present & ~lost
    count = left.sum(1, keepdims=True)
    pair = (count == 2) & ~left  # the missing modality names the pair's class: T missing is V-A, class 1
    defined = jnp.concatenate([count == 3, (count == 3) | pair, count >= 2], axis=1)
    label = jax.random.categorical(keys[2], jnp.where(defined | (count < 2), 0.0, -jnp.inf))
    one = jax.nn.one_hot(jax.random.categorical(keys[3], jnp.where(left, 0.0, -jnp.inf)), 3, dtype=bool)
    single = jax.nn.one_hot(label - 1, 3, dtype=bool)  # classes 1 to 3 replace the one that does not match
    replaced = jnp.where(
        (label == 4)[:, None], jnp.where(count == 3, ~one, one), jnp.where(count == 3, single, False)
    )
    return lost, label, defined, replaced & left & (count >= 2)
