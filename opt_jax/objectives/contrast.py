"""Contrasts: of masked frames within a clip (MACL, OPT equation 5), and of modalities across samples."""

import jax
import jax.numpy as jnp

LOWEST = -1e9


def unit(x, epsilon: float = 1e-6):
    """x [..., F] at unit length, at least in float32."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + epsilon)


def masked_frame_contrast(predictions, targets, masked, valid, temperature: float):
    """MACL: a masked frame's prediction must be nearest to its own feature among those of its clip.

    predictions, targets [B, A, F] (targets: unmasked, standardised features), masked, valid [B, A] bool.
    Returns (sum, count); the similarity is the cosine over the temperature. Clips of one frame have no
    negative and no loss.
    """
    similarity = jnp.einsum("baf,bcf->bac", unit(predictions), unit(targets)) / temperature
    similarity = jnp.where(valid[:, None, :], similarity, LOWEST)
    loss = jax.nn.logsumexp(similarity, axis=-1) - jnp.diagonal(similarity, axis1=1, axis2=2)
    weight = (masked & valid & (valid.sum(1, keepdims=True) > 1)).astype(loss.dtype)
    return (loss * weight).sum(), weight.sum()


def alignment_contrast(embeddings, available, caption_key, temperature):
    """Symmetric InfoNCE between every pair of modalities, over the whole (global) batch.

    Args:
      embeddings: three arrays [B, E] of unit vectors, for text, image and audio. available: [B, 3] bool.
      caption_key: [B] int; samples with equal captions count as correct for each other. temperature: scalar.
    Returns: (sum, count) over rows and directions; a row counts where both of its modalities are available.
    """
    same = caption_key[:, None] == caption_key[None, :]
    total, count = 0.0, 0.0
    for one in range(3):
        for other in range(one + 1, 3):
            logits = embeddings[one] @ embeddings[other].T / temperature
            rows = available[:, one] & available[:, other]
            for logits_, columns in ((logits, available[:, other]), (logits.T, available[:, one])):
                everything = jnp.where(columns[None, :], logits_, LOWEST)
                correct = jnp.where(same, everything, LOWEST)
                loss = jax.nn.logsumexp(everything, axis=1) - jax.nn.logsumexp(correct, axis=1)
                total += jnp.where(rows, loss, 0.0).sum()
                count += rows.sum()
    return total, count.astype(jnp.float32)
