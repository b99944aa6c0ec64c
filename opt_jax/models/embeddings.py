"""The three embedders (OPT section 3.1): words, image regions and audio frames become positions of one
sequence."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from opt_jax.models.layers import dense, dense_init, dropout, gelu, layer_norm, norm_init, partitioned

TEXT, IMAGE, AUDIO = 0, 1, 2  # type ids, and the order of `present`


def table(stddev: float, size: int, width: int, axis: str):
    """Initializer of a lookup table [size, width]."""
    return partitioned(nn.initializers.truncated_normal(stddev), (size, width), (axis, "embed"))


class Embedder(nn.Module):
    """Embeds text, regions and audio frames; owns the tables and projections to which heads and decoders are
    tied.

    Features come standardised (zero mean, unit deviation over the training cache), so that a masked feature,
    zero, is the mean.
    """

    hidden_size: int
    vocab_size: int
    region_size: int
    audio_size: int
    max_text_positions: int
    max_audio_positions: int
    frame_window: int
    epsilon: float
    dropout_rate: float
    stddev: float

    def setup(self):
        d, std = self.hidden_size, self.stddev
        norm = norm_init((d,), ("embed",))
        self.words = self.param("words", table(std, self.vocab_size, d, "vocab"))
        self.text_positions = self.param("text_positions", table(std, self.max_text_positions, d, "position"))
        self.types = self.param("types", table(std, 3, d, "type"))
        self.text_norm = self.param("text_norm", norm)
        self.region_mask = self.param("region_mask", table(std, 1, self.region_size, "type"))
        self.region_projection = self.param(
            "region_projection", dense_init(std, (self.region_size, d), ("feature", "embed"))
        )
        self.region_norm = self.param("region_norm", norm)
        self.box_projection = self.param("box_projection", dense_init(std, (7, d), ("feature", "embed")))
        self.box_norm = self.param("box_norm", norm)
        self.image_norm = self.param("image_norm", norm)
        self.audio_mask = self.param("audio_mask", table(std, 1, self.audio_size, "type"))
        self.audio_projection = self.param(
            "audio_projection", dense_init(std, (self.audio_size, d), ("feature", "embed"))
        )
        self.frame_norm = self.param("frame_norm", norm)
        self.audio_positions = self.param(
            "audio_positions", table(std, self.max_audio_positions, d, "position")
        )
        if self.frame_window:
            shape = (self.frame_window, d, d)
            window = dense_init(std, shape, (None, "embed", "mlp"), inputs=2)
            self.frame_convolution = self.param("frame_convolution", window)
        self.audio_norm = self.param("audio_norm", norm)

    def text(self, ids: jax.Array, key, dtype) -> jax.Array:
        """ids [B, T] to LN(word + position + type) [B, T, D]."""
        x = jnp.take(self.words, ids, axis=0) + self.text_positions[: ids.shape[1]] + self.types[TEXT]
        return dropout(key, layer_norm(self.text_norm, x.astype(dtype), self.epsilon), self.dropout_rate)

    def image(self, features, boxes, masked, key, dtype) -> jax.Array:
        """features [B, V, F], boxes [B, V, 7], masked [B, V] to LN(LN(W f) + LN(W7 box) + type) [B, V, D]."""
        x = dense(self.region_projection, hide(features, masked, self.region_mask, dtype))
        box = dense(self.box_projection, boxes.astype(dtype))
        x = layer_norm(self.region_norm, x, self.epsilon) + layer_norm(self.box_norm, box, self.epsilon)
        x = layer_norm(self.image_norm, x + self.types[IMAGE].astype(dtype), self.epsilon)
        return dropout(key, x, self.dropout_rate)

    def audio(self, features, masked, valid, key, dtype) -> jax.Array:
        """features [B, A, F], masked and valid [B, A] to LN(LN(W f) + position + type) [B, A, D].

        With a `frame_window`, GELU(convolution of LN(W f) over so many frames) is added, as wav2vec 2.0 does
        for relative positions (arXiv 2006.11477, section 2). A masked frame is mostly told by its neighbours,
        which attention has to find by their learned positions first.
        """
        x = dense(self.audio_projection, hide(features, masked, self.audio_mask, dtype))
        x = layer_norm(self.frame_norm, x, self.epsilon)
        if self.frame_window:
            x = x + gelu(convolution(self.frame_convolution, jnp.where(valid[..., None], x, 0)))
        x = x + self.audio_positions[: x.shape[1]].astype(dtype)
        x = layer_norm(self.audio_norm, x + self.types[AUDIO].astype(dtype), self.epsilon)
        return dropout(key, x, self.dropout_rate)


def convolution(params, x: jax.Array) -> jax.Array:
    """x [B, A, D] with a kernel [window, D, D] and a bias, zeros beyond the ends: [B, A, D].

    One matrix product, whose gradient is one too.
    """
    window, width, _ = params["kernel"].shape
    around = jnp.pad(x, ((0, 0), (window // 2, window // 2), (0, 0)))
    shifted = jnp.concatenate([around[:, i : i + x.shape[1]] for i in range(window)], axis=-1)
    return dense({"kernel": params["kernel"].reshape(-1, width), "bias": params["bias"]}, shifted)


def hide(features: jax.Array, masked: jax.Array, mask_embedding: jax.Array, dtype) -> jax.Array:
    """Sets masked features [B, N, F] to zero and puts the learned mask embedding [1, F] in their place."""
    masked = masked[..., None]
    return jnp.where(masked, 0, features).astype(dtype) + masked.astype(dtype) * mask_embedding.astype(dtype)
