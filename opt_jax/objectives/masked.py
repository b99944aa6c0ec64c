"""Losses on masked positions and on decoded symbols (OPT equations 1 to 6), each as (sum, count)."""

import jax
import jax.numpy as jnp


def cross_entropy(logits, labels, weight, smoothing: float = 0.0):
    """-log P(label), with label smoothing over all classes.

    logits [..., C], labels [...] int, weight [...] bool. Serves MLM, MRC, DTR and DIR.
    """
    log_total = jax.nn.logsumexp(logits, axis=-1)
    loss = log_total - jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    if smoothing:
        loss = (1 - smoothing) * loss + smoothing * (log_total - logits.mean(-1))
    weight = weight.astype(loss.dtype)
    return (loss * weight).sum(), weight.sum()


def squared_error(predictions, targets, weight):
    """MVFR and MAFR: squared distance to the standardised feature, averaged over its dimensions.

    predictions, targets [..., F], weight [...] bool.
    """
    loss = jnp.square(predictions - targets.astype(predictions.dtype)).mean(-1)
    weight = weight.astype(loss.dtype)
    return (loss * weight).sum(), weight.sum()


def accuracy(logits, labels, weight):
    """How often the best class is the label; arguments as for `cross_entropy`."""
    weight = weight.astype(jnp.float32)
    return ((logits.argmax(-1) == labels) * weight).sum(), weight.sum()
