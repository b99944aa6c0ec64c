"""The text and image decoders (OPT section 3.3): autoregressive transformers over the encoder's output M.

Both share one class: a sequence of symbols, causal attention, cross-attention to M, and an output tied to the
embedding.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from opt_jax.models.embeddings import table
from opt_jax.models.layers import (
    ByLayer,
    TransformerStack,
    dropout,
    few_rows,
    layer_norm,
    norm_init,
    partitioned,
    product,
)

Cache = tuple[tuple[jax.Array, jax.Array], ...]  # keys and values of each layer
Ready = tuple[tuple[ByLayer, ...], jax.Array]  # of each layer, and the output's table


class Decoder(nn.Module):
    """P(symbol_i | symbols_<i, M). A sequence starts with a learned vector, no symbol of the vocabulary.

    The embedding table [size, D] is given to each call where it is shared (the text decoder uses the text
    embedder's words) and is the decoder's own where `own_table` is set (image codes).
    """

    size: int
    length: int
    own_table: bool
    stack: dict[str, Any]

    def setup(self):
        d, std = self.stack["hidden_size"], self.stack["stddev"]
        self.layers = TransformerStack(**self.stack, cross_attention=True)
        self.start = self.param("start", table(std, 1, d, "type"))
        self.positions = self.param("positions", table(std, self.length, d, "position"))
        self.embedding_norm = self.param("embedding_norm", norm_init((d,), ("embed",)))
        self.output_bias = self.param(
            "output_bias", partitioned(nn.initializers.zeros, (self.size,), ("vocab",))
        )
        if self.own_table:
            self.symbols = self.param("symbols", table(std, self.size, d, "vocab"))

    def memory(self, memory: jax.Array) -> jax.Array:
        """Keys and values [L, B, S, 2, H, K] of M [B, S, D], computed once for all steps."""
        return self.layers.memory_keys_values(memory)

    def __call__(self, symbols, memory_kv, memory_valid, words=None, key=None) -> jax.Array:
        """Teacher forcing.

        Args:
          symbols: [B, T] the sequence to predict. memory_kv, memory_valid: from `memory`, and [B, S] bool;
            batch may be 1.
          words: [size, D] the shared table, unless the decoder has its own.
        Returns: logits [B, T, size]; logits at i see symbols before i only.
        """
        words = self.symbols if words is None else words
        x = jnp.take(words, symbols[:, :-1], axis=0)
        start = jnp.broadcast_to(self.start, (x.shape[0], 1, x.shape[2]))
        keys = (None, None) if key is None else jax.random.split(key)
        x = self.embed(jnp.concatenate([start, x], 1), self.positions[: symbols.shape[1]], memory_kv.dtype)
        x = dropout(keys[0], x, self.layers.dropout_rate)
        causal = jnp.tril(jnp.ones((symbols.shape[1],) * 2, bool))[None, None]
        memory_mask = memory_valid[:, None, None, :]
        x = self.layers(x, causal, memory_kv=memory_kv, memory_mask=memory_mask, key=keys[1])
        return self.logits(x, words)

    def by_layer(self, memory_kv: jax.Array, words=None) -> Ready:
        """What `step` reads of M and of the parameters; to be called once, before a loop over positions."""
        words = self.symbols if words is None else words
        return self.layers.by_layer(memory_kv), words.astype(memory_kv.dtype)

    def step(
        self, symbol, position, cache: Cache, memory_kv, memory_valid, words=None, origin=None
    ) -> tuple[jax.Array, Cache]:
        """One step of decoding G sequences for each of B memories.

        Args:
          symbol: [B * G] the one before `position` (scalar); ignored at position 0.
          cache: from `empty_cache`, or the step before. memory_valid: [B, S].
          memory_kv: from `memory`, or what `by_layer` made of it, which saves a loop much copying.
          origin: see `TransformerStack.step`.
        Returns: logits [B * G, size] of the symbol at `position`, the cache with this position.
        """
        layers, output = memory_kv if isinstance(memory_kv, tuple) else self.by_layer(memory_kv, words)
        words = self.symbols if words is None else words
        x = jnp.where(position == 0, self.start, jnp.take(words, symbol, axis=0))
        x = self.embed(x, lax.dynamic_slice_in_dim(self.positions, position, 1), output.dtype)
        x = x.reshape(len(memory_valid), -1, x.shape[-1])
        x, cache = self.layers.step(x, cache, position, layers, memory_valid[:, None, None, :], origin)
        x = self.layers.normalise_output(x).reshape(len(symbol), -1)
        return few_rows({"kernel": output, "bias": self.output_bias}, x), cache

    def empty_cache(self, batch: int, length: int, dtype, number: int = 1) -> Cache:
        """An empty key-value cache for `length` positions of `number` sequences for each of `batch` memories:
        of each layer two arrays [B, H, length, G, K]."""
        heads = self.stack["num_heads"]
        shape = (batch, heads, length, number, self.stack["hidden_size"] // heads)
        return tuple((jnp.zeros(shape, dtype),) * 2 for _ in range(self.stack["num_layers"]))

    def embed(self, x, positions, dtype):
        return layer_norm(self.embedding_norm, (x + positions).astype(dtype), self.stack["epsilon"])

    def logits(self, x, words):
        x = self.layers.normalise_output(x)
        logits = product(x, words.T.astype(x.dtype))
        return logits.astype(jnp.promote_types(x.dtype, jnp.float32)) + self.output_bias
