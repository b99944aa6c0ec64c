"""Five-way matching (OPT section 3.4, sample level): mismatched samples are made after the alignment layers.

The states of a modality depend on that modality alone up to there, so a replacement is a gather of states
between rows, and the donor can be chosen by the similarity of the embeddings from the same forward (hard
negatives, as in ALBEF, arXiv 2107.07651).
"""

import jax
import jax.numpy as jnp

NO_DONOR = -1e9


def draw_donors(key, replaced, clean, caption_key, similarity, hard_fraction: float):
    """Chooses the sample that each replaced modality comes from.

    Args:
      replaced: [R, 3] bool, of the sample-level rows. clean: [B, 3] bool, who may give.
      caption_key: ints of those rows [R] and of the batch [B]; equal captions never replace each other, and
        so no row replaces its own.
      similarity: [R, 3, B] logits of row r to modality m of sample b, or None for an even draw.
      hard_fraction: how many of the draws follow the similarity.
    Returns: donors [R, 3] int, found [R] bool (False where a needed donor does not exist).
    """
    own_key, other_key = caption_key
    num_rows, size = replaced.shape[0], clean.shape[0]
    used = own_key[:, None] == other_key[None, :]  # [R, B]: may not be chosen (any more)
    found = jnp.ones(num_rows, bool)
    hard = jax.random.bernoulli(jax.random.fold_in(key, 3), hard_fraction, (num_rows, 1))
    donors = []
    for m in range(3):
        logits = jnp.zeros((num_rows, size)) if similarity is None else jnp.where(hard, similarity[:, m], 0.0)
        allowed = clean[None, :, m] & ~used
        noise = jax.random.gumbel(jax.random.fold_in(key, m), logits.shape)
        donor = jnp.where(allowed, logits + noise, NO_DONOR).argmax(1)
        donors.append(donor)
        found &= ~replaced[:, m] | allowed.any(1)
        # The next donor is another sample, and not one that says the same as this donor.
        used |= replaced[:, m, None] & (other_key[donor][:, None] == other_key[None, :])
    return jnp.stack(donors, 1), found


def matching_loss(logits, label, defined, found):
    """Binary cross-entropy of five sigmoids against the one-hot label, over the classes that a row defines.

    logits [R, 5], label [R], defined [R, 5] bool; a row whose donors were not found [R] adds nothing to the
    sum. Returns (sum over rows of the mean over defined classes, number of rows with any).
    """
    target = jax.nn.one_hot(label, 5, dtype=logits.dtype)
    # softplus(x) - x * t is the cross-entropy of sigmoid(x) against t.
    each = jnp.where(defined & found[:, None], jax.nn.softplus(logits) - logits * target, 0.0)
    number = defined.sum(1)
    return (each.sum(1) / jnp.maximum(number, 1)).sum(), (number > 0).sum().astype(logits.dtype)


# The class that says "this pair belongs together", by the modalities shown.
PAIR_CLASS = {("text", "image"): 3, ("text", "audio"): 2, ("image", "audio"): 1}


def pair_score(logits, pair: tuple[str, str]):
    """Ranking score [...] of logits [..., 5] for two modalities."""
    return logits[..., PAIR_CLASS[pair]] - logits[..., 4]


def image_for_text_audio_score(logits):
    """Ranking score [...] of an image beside a text and a recording: all match, against only T and A do."""
    return logits[..., 0] - logits[..., 2]
