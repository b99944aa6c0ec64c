"""The cross-modal encoder (OPT section 3.2), with this project's alignment layers before the fusion.

The first `num_alignment_layers` layers attend within a modality only. Their output gives one embedding per
modality for the contrast, and is what matching's replacements exchange between samples. Before the fusion
[CLS] is told how well the embeddings of each pair of modalities agree: a product of two modalities, which
attention and feed-forward layers alone learn only after a long plateau (ViLBERT, arXiv 1908.02265, gives its
alignment head such a product). With 0 alignment layers this is the paper's encoder.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from opt_jax.models.layers import TransformerStack, dense, dense_init, layer_norm, norm_init, partitioned

CLS_GROUP = 3
MODALITIES = ("text", "image", "audio")
PAIRS = ((0, 1), (0, 2), (1, 2))


def group_ids(text: int, regions: int, frames: int) -> jax.Array:
    """Which modality a position belongs to, [S]; [CLS], at position 0, belongs to none."""
    return jnp.array([CLS_GROUP] + [0] * (text - 1) + [1] * regions + [2] * frames)


def masked_mean(x: jax.Array, valid: jax.Array) -> jax.Array:
    """Mean of x [B, N, D] over its valid [B, N] positions, at least in float32; zero where there is none."""
    weight = valid[..., None].astype(jnp.promote_types(x.dtype, jnp.float32))
    return (x * weight).sum(1) / jnp.maximum(weight.sum(1), 1)


class CrossEncoder(nn.Module):
    """M = CrossEncoder([T; V; A]) in two parts: `align`, within each modality, then `fuse`, across them."""

    num_alignment_layers: int
    alignment_size: int
    temperature_init: float
    temperature_min: float
    stack: dict[str, Any]

    def setup(self):
        self.layers = TransformerStack(**self.stack)
        if self.num_alignment_layers:
            d = self.stack["hidden_size"]
            self.alignment_norm = self.param("alignment_norm", norm_init((d,), ("embed",)))
            self.alignment_projections = {
                name: self.param(
                    f"align_{name}", dense_init(d**-0.5, (d, self.alignment_size), ("embed", "class"))
                )
                for name in MODALITIES
            }
            agreement = dense_init(self.stack["stddev"], (len(PAIRS), d), ("type", "embed"))
            self.agreement = self.param("agreement", agreement)
            log_temperature = nn.initializers.constant(jnp.log(self.temperature_init))
            self.log_temperature = self.param("log_temperature", partitioned(log_temperature, (), ()))

    def align(self, x: jax.Array, valid: jax.Array, groups: jax.Array, key) -> jax.Array:
        """Runs x [B, S, D] through the layers in which a position sees its own group only.

        valid [B, S] bool, groups [S] from `group_ids`.
        """
        if not self.num_alignment_layers:
            return x
        mask = (groups[:, None] == groups[None, :]) & valid[:, None, :]
        return self.layers(x, mask[:, None], key=key, stop=self.num_alignment_layers)

    def embeddings(self, x: jax.Array, valid: jax.Array, groups: jax.Array) -> dict[str, jax.Array]:
        """One unit vector [B, E] in float32 for each modality, from the output of `align`."""
        out = {}
        for number, name in enumerate(MODALITIES):
            mean = masked_mean(x, valid & (groups == number))
            projected = dense(
                self.alignment_projections[name], layer_norm(self.alignment_norm, mean, self.stack["epsilon"])
            )
            # Of an absent modality the projection is zero, where a division by the norm has no gradient.
            square = jnp.square(projected).sum(-1, keepdims=True)
            out[name] = projected * jax.lax.rsqrt(jnp.maximum(square, 1e-12))
        return out

    def temperature(self) -> jax.Array:
        """The contrast's temperature, learned and kept above `temperature_min`."""
        return jnp.maximum(jnp.exp(self.log_temperature), self.temperature_min)

    def agreements(self, x: jax.Array, valid: jax.Array, groups: jax.Array) -> jax.Array:
        """sqrt(E) times the cosines of the embeddings of text and image, text and audio, image and audio.

        The factor gives unrelated pairs about unit variance. Returns: [B, 3]; 0 where one of two is absent.
        """
        unit = list(self.embeddings(x, valid, groups).values())
        there = [(valid & (groups == number)).any(1) for number in range(len(MODALITIES))]
        cosines = [jnp.where(there[a] & there[b], (unit[a] * unit[b]).sum(-1), 0.0) for a, b in PAIRS]
        return jnp.stack(cosines, axis=-1) * self.alignment_size**0.5

    def fuse(self, x: jax.Array, valid: jax.Array, groups: jax.Array, key) -> jax.Array:
        """Runs the output of `align` through the remaining layers, over all valid [B, S] positions.

        Returns: M [B, S, D].
        """
        if self.num_alignment_layers:
            told = dense(self.agreement, self.agreements(x, valid, groups).astype(x.dtype))
            x = x.at[:, 0].add(told)
        x = self.layers(x, valid[:, None, None, :], key=key, start=self.num_alignment_layers)
        return self.layers.normalise_output(x)
