"""How many floating-point operations the matrix products of one pre-training step need (OPT's network)."""

from collections.abc import Mapping

from opt_jax.models.opt import Sizes

WITH_GRADIENTS = 6  # operations for one multiply-add: forward, gradient of the input, gradient of the weight
WITHOUT_INPUT_GRADIENT = 4


def count(model: Mapping, sizes: Sizes, rows, batch: int, lengths: tuple[int, int, int]) -> float:
    """Operations of one step, forward and backward, without recomputation.

    2 x multiply-adds for each product forward and twice that backward, 6 in all; the projections of
    features and boxes need no gradient of their input, so 4. Multiply-adds of a transformer layer with width
    D, feed-forward F and n positions that each see s: n (4 D^2 + 2 D F) + 2 n s D; cross-attention to m
    positions adds n 2 D^2 + m 2 D^2 + 2 n m D. Only what the mathematics needs counts: s is the own modality
    in alignment layers and (n + 1) / 2 on average in causal attention, also where a program computes all
    pairs and masks them. The heads of masked words, regions and frames count at all positions of token-level
    rows (1.5 % of a step of `base`), as both programs compute them. Look-ups, norms, softmax, dropout and
    optimizer count nothing; all positions count as valid.

    Args:
      model: the `model` part of a configuration. rows: (token, modality, sample) rows of a group.
      batch: rows B. lengths: (T, V, A).
    """
    d, group = model["hidden_size"], sum(rows)
    t, v, a = lengths
    s = t + v + a
    token, modality, sample = (batch * part // group for part in rows)
    within = 1 + (t - 1) ** 2 + v**2 + a**2
    aligned = model["num_alignment_layers"]

    encoder = model["num_layers"] * batch * s * (4 * d * d + 2 * d * model["mlp_size"])
    encoder += batch * 2 * d * (aligned * within + (model["num_layers"] - aligned) * s * s)
    products = encoder + batch * a * model["frame_window"] * d * d
    if aligned:
        # Embeddings for the contrast, and again of what is fused for the agreement that [CLS] is told.
        products += batch * 3 * d * (2 * model["alignment_size"] + 1)

    for part, n, size in (
        (model["text_decoder"], t - 1, sizes.vocab_size),
        (model["image_decoder"], sizes.codes_per_image, sizes.num_codes),
    ):
        layer = n * (6 * d * d + 2 * d * part["mlp_size"]) + s * 2 * d * d
        layer += n * (n + 1) * d + 2 * n * s * d
        products += modality * (part["num_layers"] * layer + n * d * size)

    regions = (v, sizes.region_size), (v, sizes.num_region_classes + 1)
    heads = ((t, sizes.vocab_size), *regions, (a, sizes.audio_size))
    products += token * sum(n * (d * d + d * out) for n, out in heads) + sample * 5 * d
    inputs = batch * d * (v * (sizes.region_size + 7) + a * sizes.audio_size)
    return float(WITH_GRADIENTS * products + WITHOUT_INPUT_GRADIENT * inputs)
