"""Transformer layers as pure functions over parameters that are stacked along the layers.

A stack's parameters have a leading axis L, whatever the depth, so that the same tree serves a scan, an
unrolled loop and a part of the stack. Attention and layer normalisation follow BERT (arXiv 1810.04805) and,
for the pre-norm switch, arXiv 2002.04745.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

Params = dict[str, Any]
MASKED_LOGIT = -1e9  # finite, so that a row that may attend to nothing gives a mean and not NaN


def partitioned(initializer: Callable, shape: Sequence[int], axes: Sequence[str | None]) -> Callable:
    """An initializer of `shape` whose result carries the logical `axes` names, one for each dimension."""
    boxed = nn.with_logical_partitioning(initializer, tuple(axes))
    return lambda key: boxed(key, tuple(shape), jnp.float32)


def dense_init(stddev: float, shape: Sequence[int], axes: Sequence[str | None], inputs: int = 1) -> Callable:
    """Initializer of {'kernel', 'bias'}; the bias has the kernel's dimensions less the `inputs` ones it
    contracts.

    A leading axis called 'layers' stands before the contracted dimensions and is kept in the bias.
    """
    lead = 1 if axes[0] == "layers" else 0
    bias_dims = [*range(lead), *range(lead + inputs, len(shape))]

    def init(key):
        return {
            "kernel": partitioned(nn.initializers.truncated_normal(stddev), shape, axes)(key),
            "bias": partitioned(
                nn.initializers.zeros, [shape[i] for i in bias_dims], [axes[i] for i in bias_dims]
            )(key),
        }

    return init


def norm_init(shape: Sequence[int], axes: Sequence[str | None]) -> Callable:
    """Initializer of a layer norm's {'scale', 'bias'}."""

    def init(key):
        return {
            "scale": partitioned(nn.initializers.ones, shape, axes)(key),
            "bias": partitioned(nn.initializers.zeros, shape, axes)(key),
        }

    return init


def dense(params: Params, x: jax.Array) -> jax.Array:
    """x [..., D] times kernel [D, ...] plus bias, in the dtype of x."""
    return product(x, params["kernel"].astype(x.dtype)) + params["bias"].astype(x.dtype)


def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., D] times kernel [D, ...].

    The rows of x become one axis, so that the kernel's gradient contracts one axis: for several, XLA copies
    both operands on a CPU.
    """
    rows = x.reshape(-1, x.shape[-1])
    return lax.dot_general(rows, kernel, (((1,), (0,)), ((), ()))).reshape(*x.shape[:-1], *kernel.shape[1:])


def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU (arXiv 1606.08415), x times the normal distribution function at x, in the dtype of x.

    Through erf in at least float32, which costs a CPU half of the erfc in `jax.nn.gelu`.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * (0.5 + 0.5 * lax.erf(wide * 0.5**0.5))).astype(x.dtype)


def layer_norm(params: Params, x: jax.Array, epsilon: float) -> jax.Array:
    """Layer normalisation over the last axis; statistics in float32 (or float64), result in the dtype of
    x."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = wide.mean(-1, keepdims=True)
    centred = wide - mean
    variance = (centred * centred).mean(-1, keepdims=True)
    normal = centred * lax.rsqrt(variance + epsilon)
    return (normal * params["scale"] + params["bias"]).astype(x.dtype)


def dropout(key: jax.Array | None, x: jax.Array, rate: float) -> jax.Array:
    """Inverted dropout; no key or rate 0 returns x.

    A byte of randomness decides an element (four elements for one 32-bit draw, whose cost shows on a CPU), so
    the rate is rounded to a multiple of 1/256; the scale uses the rounded rate and stays unbiased.
    """
    threshold = round(rate * 256)
    if key is None or threshold == 0:
        return x
    *lead, last = x.shape
    words = jax.random.bits(key, (*lead, -(-last // 4)), jnp.uint32)
    draws = lax.bitcast_convert_type(words, jnp.uint8).reshape(*lead, -1)[..., :last]
    return jnp.where(draws >= threshold, x * (256 / (256 - threshold)), 0).astype(x.dtype)


def attention(q, k, v, mask, key=None, rate=0.0):
    """Scaled dot-product attention.

    Args:
      q: [B, Q, H, K] queries. k, v: [B, S, H, K].
      mask: bool, broadcastable to [B, H, Q, S]; True may be attended.
      key, rate: dropout on the attention probabilities.
    Returns: [B, Q, H, K] in the dtype of q; the softmax is in float32.
    """
    logits = jnp.einsum("bqhk,bshk->bhqs", q * (q.shape[-1] ** -0.5), k)
    logits = jnp.where(mask, logits.astype(jnp.promote_types(q.dtype, jnp.float32)), MASKED_LOGIT)
    probabilities = dropout(key, jax.nn.softmax(logits, axis=-1).astype(q.dtype), rate)
    return jnp.einsum("bhqs,bshk->bqhk", probabilities, v)


def merge_heads(params: Params, x: jax.Array) -> jax.Array:
    """x [B, Q, H, K] times kernel [H, K, D] plus bias: [B, Q, D]."""
    flat = {"kernel": params["kernel"].reshape(-1, params["kernel"].shape[-1]), "bias": params["bias"]}
    return dense(flat, x.reshape(*x.shape[:-2], -1))


class TransformerStack(nn.Module):
    """L transformer layers; with `cross_attention` each also attends to a memory, as a decoder does.

    Post-norm (BERT) or pre-norm with one more norm at the end (`final_norm`). A part of the stack can be run
    with `start` and `stop`. `unroll` is the number of layers a loop iteration runs: L removes the loop, 1
    compiles fastest.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    mlp_size: int
    pre_norm: bool = False
    cross_attention: bool = False
    epsilon: float = 1e-12
    dropout_rate: float = 0.0
    stddev: float = 0.02
    remat: bool = False
    unroll: int = 1

    def setup(self):
        n, d, h, f = self.num_layers, self.hidden_size, self.num_heads, self.mlp_size
        k = d // h
        make = partial(dense_init, self.stddev)
        norm = norm_init((n, d), ("layers", "embed"))
        inits = {
            "self_norm": norm,
            "qkv": make((n, d, 3, h, k), ("layers", "embed", None, "heads", "kv")),
            "self_out": make((n, h, k, d), ("layers", "heads", "kv", "embed"), inputs=2),
            "mlp_norm": norm,
            "mlp_in": make((n, d, f), ("layers", "embed", "mlp")),
            "mlp_out": make((n, f, d), ("layers", "mlp", "embed")),
        }
        if self.cross_attention:
            inits |= {
                "cross_norm": norm,
                "query": make((n, d, h, k), ("layers", "embed", "heads", "kv")),
                "memory": make((n, d, 2, h, k), ("layers", "embed", None, "heads", "kv")),
                "cross_out": make((n, h, k, d), ("layers", "heads", "kv", "embed"), inputs=2),
            }
        self.layers = {name: self.param(name, init) for name, init in inits.items()}
        if self.pre_norm:
            self.final_norm = self.param("final_norm", norm_init((d,), ("embed",)))

    def normalise_output(self, x: jax.Array) -> jax.Array:
        """The norm that ends a pre-norm stack; a post-norm stack is normalised already."""
        return layer_norm(self.final_norm, x, self.epsilon) if self.pre_norm else x

    def memory_keys_values(self, memory: jax.Array) -> jax.Array:
        """Keys and values of every layer for a memory [B, S, D]: [L, B, S, 2, H, K]."""
        return jax.vmap(dense, in_axes=(0, None))(self.layers["memory"], memory)

    def __call__(
        self, x, mask, *, memory=None, memory_mask=None, memory_kv=None, key=None, start=0, stop=None
    ):
        """Runs layers `start` to `stop` on x [B, Q, D].

        Args:
          mask: bool, broadcastable to [B, 1, Q, Q]. memory: [B, S, D] with memory_mask [B, 1, 1, S] (decoders
            only), or memory_kv from `memory_keys_values`, whose batch may be 1 for a memory that all rows
            share.
          key: dropout key, or None for no dropout.
        Returns: [B, Q, D], before `normalise_output`.
        """
        stop = self.num_layers if stop is None else stop
        if self.cross_attention and memory_kv is None:
            memory_kv = self.memory_keys_values(memory)
        part = jax.tree.map(lambda leaf: leaf[start:stop], (self.layers, memory_kv))
        keys = None if key is None else jax.random.split(key, self.num_layers)[start:stop]

        def layer(x, xs):
            (params, kv), key = xs
            x, _ = self.layer(params, x, mask, kv, memory_mask, key)
            return x, None

        if self.remat:
            layer = jax.checkpoint(layer)
        return lax.scan(
            layer, x, (part, keys), length=stop - start, unroll=max(1, min(self.unroll, stop - start))
        )[0]

    def step(self, x, cache, position, memory_kv, memory_mask):
        """One decoding step of the whole stack with a key-value cache.

        Args:
          x: [B, 1, D] the newest position. cache: (keys, values), each [L, B, Q, H, K]. position: scalar,
            where x stands.
        Returns: ([B, 1, D] before `normalise_output`, the cache with this position written).
        """
        length = cache[0].shape[2]
        mask = (jnp.arange(length) <= position)[None, None, None, :]

        def layer(x, xs):
            params, kv, *past = xs
            return self.layer(params, x, mask, kv, memory_mask, None, past, position)

        return lax.scan(layer, x, (self.layers, memory_kv, *cache), unroll=max(1, self.unroll))

    def layer(self, params, x, mask, memory_kv, memory_mask, key, past=None, position=None):
        """One layer. `past` (keys, values) [B, Q, H, K] are written at `position` and attended instead of x
        alone."""
        keys = [None] * 5 if key is None else jax.random.split(key, 5)
        rate = self.dropout_rate

        def residual(name, x, block, key):
            if self.pre_norm:
                return x + dropout(key, block(layer_norm(params[name], x, self.epsilon)), rate)
            return layer_norm(params[name], x + dropout(key, block(x), rate), self.epsilon)

        cache = None

        def self_attention(x):
            nonlocal cache
            qkv = dense(params["qkv"], x)
            q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
            if past is not None:
                k, v = (
                    lax.dynamic_update_slice_in_dim(old, new, position, 1)
                    for old, new in zip(past, (k, v), strict=True)
                )
                cache = (k, v)
            return merge_heads(params["self_out"], attention(q, k, v, mask, keys[1], rate))

        def cross_attention(x):
            q = dense(params["query"], x)
            if memory_kv.shape[0] < q.shape[0]:  # one memory for all rows: their queries become one long row
                q = q.reshape(1, -1, *q.shape[2:])
            out = attention(q, memory_kv[:, :, 0], memory_kv[:, :, 1], memory_mask, keys[3], rate)
            return merge_heads(params["cross_out"], out.reshape(*x.shape[:2], *out.shape[2:]))

        x = residual("self_norm", x, self_attention, keys[0])
        if self.cross_attention:
            x = residual("cross_norm", x, cross_attention, keys[2])
        x = residual(
            "mlp_norm",
            x,
            lambda y: dense(params["mlp_out"], gelu(dense(params["mlp_in"], y))),
            keys[4],
        )
        return x, cache
