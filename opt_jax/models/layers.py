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
ByLayer = tuple[Params, jax.Array, jax.Array]  # see TransformerStack.by_layer
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
    draws = lax.bitcast_convert_type(words, jnp.uint8).reshape(*lead, 4 * words.shape[-1])[..., :last]
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


def attention_by_head(q, k, v, mask):
    """Attention of q [B, Q, H, K] over k, v [B, H, S, K], which need no transposing: [B, Q, H * K].

    mask and softmax as in `attention`.
    """
    logits = jnp.einsum("bqhk,bhsk->bhqs", q * (q.shape[-1] ** -0.5), k)
    logits = jnp.where(mask, logits.astype(jnp.promote_types(q.dtype, jnp.float32)), MASKED_LOGIT)
    out = jnp.einsum("bhqs,bhsk->bqhk", jax.nn.softmax(logits, axis=-1).astype(q.dtype), v)
    return out.reshape(*out.shape[:2], -1)


def for_few_rows(params: Params, dtype) -> Params:
    """What `dense` takes, with all inputs and all outputs of the kernel as one axis each, for `few_rows`."""
    bias = params["bias"].reshape(-1)
    kernel = params["kernel"].reshape(-1, bias.size).T
    return {"kernel": kernel.astype(dtype), "bias": bias.astype(dtype)}


def few_rows(params: Params, x: jax.Array) -> jax.Array:
    """x [..., D] times kernel [F, D] plus bias [F]: [..., F].

    Of a few dozen rows a CPU computes the product in this order in about half the time of the other.
    """
    rows = x.reshape(-1, x.shape[-1])
    out = lax.dot_general(params["kernel"], rows, (((1,), (1,)), ((), ()))) + params["bias"][:, None]
    return out.T.reshape(*x.shape[:-1], -1)


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
            return self.layer(params, x, mask, kv, memory_mask, key), None

        if self.remat:
            layer = jax.checkpoint(layer)
        return lax.scan(
            layer, x, (part, keys), length=stop - start, unroll=max(1, min(self.unroll, stop - start))
        )[0]

    def by_layer(self, memory_kv: jax.Array) -> tuple[ByLayer, ...]:
        """What decoding reads in each step, in the form in which it reads it.

        A product with one layer's part of a stacked array first copies that part, which on a CPU takes longer
        than the product. A loop over positions calls this once, before it begins.

        Args:
          memory_kv: [L, B, S, 2, H, K] from `memory_keys_values`.
        Returns: for each layer its parameters, those of products as `for_few_rows` makes them, and keys and
        values [B, H, S, K] of the memory.
        """
        memory_kv = memory_kv.transpose(3, 0, 1, 4, 2, 5)
        layers = []
        for i in range(self.num_layers):
            params = dict(jax.tree.map(lambda leaf, i=i: leaf[i], self.layers))
            products = params.keys() - {"self_norm", "cross_norm", "mlp_norm", "memory"}
            params |= {name: for_few_rows(params[name], memory_kv.dtype) for name in products}
            layers.append((params, memory_kv[0, i], memory_kv[1, i]))
        return tuple(layers)

    def step(self, x, cache, position, layers, memory_mask, origin=None):
        """One decoding step of the whole stack with a key-value cache.

        Args:
          x: [B, G, D] the newest position of G sequences that share a memory.
          cache: for each layer (keys, values), each [B, H, Q, G, K]. position: scalar, where x stands.
          layers: from `by_layer`. memory_mask: bool, broadcastable to [B, H, G, S].
          origin: [B, G, Q] int, which of the G sequences wrote what each of them continues at each position;
            by default each its own.
        Returns: ([B, G, D] before `normalise_output`, the cache with this position written).
        """
        *_, length, number, _ = cache[0][0].shape
        written = jnp.arange(length)[:, None] <= position
        origin = jnp.arange(number)[None, :, None] if origin is None else origin
        mask = written & (origin[..., None] == jnp.arange(number))
        mask = mask.reshape(*mask.shape[:2], -1)[:, None]
        new = []
        for (params, *memory), past in zip(layers, cache, strict=True):
            x, past = self.step_layer(params, x, mask, memory, memory_mask, past, position)
            new.append(past)
        return x, tuple(new)

    def step_layer(self, params, x, mask, memory, memory_mask, past, position):
        """One layer of `step`; mask: [B, 1, G, Q * G]; memory, past: keys and values."""

        _, heads, _, size = memory[0].shape

        def self_attention(x):
            nonlocal past
            q, *new = jnp.moveaxis(few_rows(params["qkv"], x).reshape(*x.shape[:2], 3, heads, size), 2, 0)
            new = (part.swapaxes(1, 2)[:, :, None] for part in new)
            past = tuple(
                lax.dynamic_update_slice_in_dim(old, part, position, 2)
                for old, part in zip(past, new, strict=True)
            )
            k, v = (part.reshape(*part.shape[:2], -1, part.shape[-1]) for part in past)
            return few_rows(params["self_out"], attention_by_head(q, k, v, mask))

        def cross_attention(x):
            q = few_rows(params["query"], x).reshape(*x.shape[:2], heads, size)
            return few_rows(params["cross_out"], attention_by_head(q, *memory, memory_mask))

        def mlp(x):
            return few_rows(params["mlp_out"], gelu(few_rows(params["mlp_in"], x)))

        x = self.residual(params["self_norm"], x, self_attention)
        x = self.residual(params["cross_norm"], x, cross_attention)
        return self.residual(params["mlp_norm"], x, mlp), past

    def layer(self, params, x, mask, memory_kv, memory_mask, key):
        """One layer of `__call__`."""
        keys = [None] * 5 if key is None else jax.random.split(key, 5)
        rate = self.dropout_rate

        def self_attention(x):
            qkv = dense(params["qkv"], x)
            out = attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], mask, keys[1], rate)
            return merge_heads(params["self_out"], out)

        def cross_attention(x):
            q = dense(params["query"], x)
            if memory_kv.shape[0] < q.shape[0]:  # one memory for all rows: their queries become one long row
                q = q.reshape(1, -1, *q.shape[2:])
            out = attention(q, memory_kv[:, :, 0], memory_kv[:, :, 1], memory_mask, keys[3], rate)
            return merge_heads(params["cross_out"], out.reshape(*x.shape[:2], *out.shape[2:]))

        x = self.residual(params["self_norm"], x, self_attention, keys[0])
        if self.cross_attention:
            x = self.residual(params["cross_norm"], x, cross_attention, keys[2])
        return self.residual(
            params["mlp_norm"],
            x,
            lambda y: dense(params["mlp_out"], gelu(dense(params["mlp_in"], y))),
            keys[4],
        )

    def residual(self, norm, x, block, key=None):
        """x with what `block` makes of it, normalised before or after."""
        if self.pre_norm:
            return x + dropout(key, block(layer_norm(norm, x, self.epsilon)), self.dropout_rate)
        return layer_norm(norm, x + dropout(key, block(x), self.dropout_rate), self.epsilon)
