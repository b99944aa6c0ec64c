"""Gumbel product quantizer of wav2vec 2.0 (arXiv 2006.11477, section 2 "Quantization module") and the
pre-training model.

Letters: B batch, F frames, D width, G codebooks (groups), K entries of each, Q width of a quantized vector, P
width in which context and target are compared.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from ml_collections import ConfigDict

from opt_jax.encoders.wav2vec2 import Wav2Vec2, Wav2Vec2Output
from opt_jax.encoders.wav2vec2_layers import dense


@struct.dataclass
class Quantized:
    """vectors [B, F, Q]; codes [B, F, G], the entries chosen; probabilities [B, F, G, K] before any noise."""

    vectors: jax.Array
    codes: jax.Array
    probabilities: jax.Array


class Quantizer(nn.Module):
    """Chooses one entry of each of G codebooks and concatenates them.

    With a `temperature` the choice is sampled by Gumbel noise (stream 'gumbel') and its gradient is that of
    the softmax (straight through, eq. 1); without one it is the most likely entry.
    """

    config: ConfigDict

    @nn.compact
    def __call__(self, x: jax.Array, temperature: jax.Array | float | None = None) -> Quantized:
        """x [B, F, C] -> Quantized."""
        c = self.config
        groups, entries = c.num_codebooks, c.codebook_size
        if c.codevector_dim % groups:
            raise ValueError(
                f"ssl.codevector_dim {c.codevector_dim} is not a multiple of num_codebooks {groups}"
            )
        logits = dense(groups * entries, ("feature", "code"), "logits", scale=1.0)(x)
        logits = logits.reshape(*x.shape[:2], groups, entries)
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        probabilities = jax.nn.softmax(logits, axis=-1)
        if temperature is None:
            choice = jax.nn.one_hot(logits.argmax(axis=-1), entries, dtype=logits.dtype)
        else:
            noise = jax.random.gumbel(self.make_rng("gumbel"), logits.shape, logits.dtype)
            soft = jax.nn.softmax((logits + noise) / temperature, axis=-1)
            hard = jax.nn.one_hot(soft.argmax(axis=-1), entries, dtype=soft.dtype)
            choice = hard + (soft - jax.lax.stop_gradient(soft))
        # Centred, unlike the released uniform(0, 1): entries with a common direction make all targets alike,
        # and the contrast then starts on a plateau.
        init = nn.with_logical_partitioning(nn.initializers.normal(1.0), (None, "code", None))
        codebooks = self.param("codebooks", init, (groups, entries, c.codevector_dim // groups))
        vectors = jnp.einsum("bfgk,gkd->bfgd", choice.astype(x.dtype), codebooks)
        return Quantized(
            vectors.reshape(*x.shape[:2], c.codevector_dim), choice.argmax(axis=-1), probabilities
        )


@struct.dataclass
class PretrainingOutput:
    """context and targets [B, F, P], to be compared; the quantizer's and the encoder's outputs."""

    context: jax.Array
    targets: jax.Array
    quantized: Quantized
    encoder: Wav2Vec2Output


class Wav2Vec2ForPretraining(nn.Module):
    """Encoder over masked frames and quantizer over unmasked ones, projected to one space (section 3.2)."""

    model: ConfigDict
    ssl: ConfigDict

    @nn.compact
    def __call__(
        self,
        waveforms: jax.Array,
        lengths: jax.Array,
        mask: jax.Array | None,
        temperature: jax.Array | float | None = None,
        deterministic: bool = True,
    ) -> PretrainingOutput:
        """waveforms [B, N] normalized, lengths [B], mask [B, F] bool: frames hidden from the encoder."""
        encoded = Wav2Vec2(self.model, name="wav2vec2")(waveforms, lengths, mask, deterministic)
        features = nn.Dropout(self.ssl.feature_dropout)(
            encoded.normalized_features, deterministic=deterministic
        )
        quantized = Quantizer(self.ssl, name="quantizer")(features, temperature)
        return PretrainingOutput(
            context=dense(self.ssl.projection_dim, ("embed", "feature"), "project_context")(
                encoded.last_hidden_state
            ),
            targets=dense(self.ssl.projection_dim, ("feature", "feature"), "project_targets")(
                quantized.vectors
            ),
            quantized=quantized,
            encoder=encoded,
        )
