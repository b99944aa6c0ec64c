"""Decoding of text and of image codes with a key-value cache: greedy, sampled (top-k, top-p) and beam search.

All functions are pure and meant to run under `jax.jit` with the model and the keyword arguments static. One
compiled program serves a whole batch; the loop ends early when every row has ended.
"""

import jax
import jax.numpy as jnp
from jax import lax

from opt_jax.models.opt import OPT

NEVER = -1e9


def generate_text(model: OPT, params, memory, valid, key=None, *, max_length, end_id, pad_id, **options):
    """A text for M: drawn where a key is given, else the most likely one.

    Args:
      memory, valid: M [B, S, D] and [B, S] from `OPT.encode`.
      max_length: positions to decode at most, the end symbol included. end_id, pad_id: of the vocabulary.
      options: temperature, top_k, top_p (see `sample`) with a key; beams, length_penalty (see `search`)
        without.
    Returns: ids [B, max_length] (end symbol, then pad_id), log-probability [B], at least in float32.
    """
    sequence = {"what": "text", "length": max_length, "end_id": end_id}
    if key is None:
        return search(model, params, memory, valid, **sequence, pad_id=pad_id, **options)
    ids, score = sample(model, params, memory, valid, key, **sequence, **options)
    after = jnp.cumsum(ids == end_id, axis=1) - (ids == end_id) > 0
    return jnp.where(after, pad_id, ids), score


def generate_image_codes(model: OPT, params, memory, valid, key=None, **options):
    """The codes of a picture for M: drawn where a key is given, else the most likely ones.

    Args:
      memory, valid: M [B, S, D] and [B, S] from `OPT.encode`.
      options: temperature, top_k, top_p, guidance (see `sample`) with a key; beams (see `search`) without.
    Returns: codes [B, G], log-probability [B], at least in float32.
    """
    sequence = {"what": "image", "length": model.sizes.codes_per_image}
    if key is None:
        return search(model, params, memory, valid, **sequence, **options)
    return sample(model, params, memory, valid, key, **sequence, **options)


def search(
    model: OPT, params, memory, valid, *, what, length, end_id=-1, pad_id=0, beams=1, length_penalty=1.0
):
    """The most likely sequence for M: greedy with one beam, beam search with several.

    Args:
      memory, valid: M [B, S, D] and [B, S] from `OPT.encode`.
      what: 'text' or 'image'. length: positions to decode at most, the end symbol included. end_id: symbol
        that ends a text, -1 for none (codes have none). pad_id: what follows it.
      beams: hypotheses kept alive. One that ends among the best `beams` is finished and leaves; a row is done
        with `beams` finished ones, or without an end symbol after `length` positions.
      length_penalty: a hypothesis scores its log-probability divided by its length to this power.
    Returns: symbols [B, length] (end symbol, then pad_id), log-probability [B], at least in float32.
    """
    step, cache, table = _decoder(model, params, memory, valid, what, length, beams)
    size = memory.shape[0]
    rows = jnp.arange(size)
    dtype = jnp.promote_types(memory.dtype, jnp.float32)  # of the logits
    # All beams start equal: only the first counts.
    alive = jnp.where(jnp.arange(beams) == 0, 0.0, NEVER).astype(dtype)
    never = jnp.full(size, NEVER, dtype)
    own = jnp.arange(beams)[:, None]
    nothing = jnp.full((size, length), pad_id, jnp.int32), never, never
    state = (
        0,
        jnp.full((size, beams, length), pad_id, jnp.int32),
        jnp.broadcast_to(alive, (size, beams)),
        nothing,  # the best finished hypothesis of each row: ids, log-probability, score
        jnp.zeros(size, jnp.int32),  # how many have finished
        jnp.broadcast_to(own, (size, beams, length)),  # which beam wrote what a beam continues
        cache,
    )

    def running(state):
        position, _, _, _, finished, _, _ = state
        return (position < length) & (finished < beams).any()

    def better(best, ids, scores, written, counts):
        """The best of each row's finished hypothesis and these [B, N] of `written` symbols, where `counts`
        [B, N] holds."""
        values = jnp.where(counts, scores / written**length_penalty, NEVER)
        first = values.argmax(1)
        improves = values[rows, first] > best[2]
        ids = jnp.where(improves[:, None], ids[rows, first], best[0])
        return ids, *(
            jnp.where(improves, new[rows, first], old)
            for new, old in zip((scores, values), best[1:], strict=True)
        )

    def advance(state):
        position, ids, scores, best, finished, origin, cache = state
        last = lax.dynamic_index_in_dim(ids, jnp.maximum(position - 1, 0), 2, keepdims=False)
        logits, cache = step(last.reshape(-1), position, cache, origin)
        log_probs = jax.nn.log_softmax(logits).reshape(size, beams, -1)
        # At most one continuation of each beam ends, so of twice as many as beams enough go on.
        scores, chosen = lax.top_k((scores[..., None] + log_probs).reshape(size, -1), 2 * beams)
        parent, symbol = chosen // table, (chosen % table).astype(jnp.int32)
        ids = jnp.take_along_axis(ids, parent[..., None], 1)
        ids = lax.dynamic_update_slice_in_dim(ids, symbol[..., None], position, 2)
        ends = symbol == end_id
        counts = ends & (jnp.arange(2 * beams) < beams) & (finished < beams)[:, None]
        best = better(best, ids, scores, position + 1, counts)
        finished += counts.sum(1, dtype=jnp.int32)
        scores, kept = lax.top_k(jnp.where(ends, NEVER, scores), beams)
        ids, parent = jnp.take_along_axis(ids, kept[..., None], 1), jnp.take_along_axis(parent, kept, 1)
        # The cache stays where it is; what a beam continues is found there.
        origin = jnp.take_along_axis(origin, parent[..., None], 1)
        origin = jnp.where(jnp.arange(length) <= position, origin, own)
        return position + 1, ids, scores, best, finished, origin, cache

    written, ids, scores, best, finished, _, _ = lax.while_loop(running, advance, state)
    # A row that ran out of positions may also give what has not ended.
    counts = jnp.broadcast_to((finished < beams)[:, None], scores.shape)
    ids, score, _ = better(best, ids, scores, written, counts)
    return ids, score


def sample(
    model: OPT,
    params,
    memory,
    valid,
    key,
    *,
    what,
    length,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    end_id=-1,
    guidance=0.0,
):
    """Draws a sequence symbol by symbol.

    Args:
      memory, valid: M [B, S, D] and [B, S]; with guidance [2 B, ...], the second half of nothing shown.
      what: 'text' or 'image'. length: positions to draw (a picture's number of codes).
      temperature: divides the logits; 0 takes the best symbol. top_k: draws among the k best only, 0 for all.
      top_p: draws among the fewest symbols whose probability reaches p. end_id: symbol after which a text is
        done, -1 for none. guidance: w of classifier-free guidance (arXiv 2207.12598): the logits are moved by
        w times their difference from those of a model that is shown nothing.
    Returns: symbols [B, length] (end_id repeated after the end), log-probability [B] under the model,
    unfiltered.
    """
    step, cache, _ = _decoder(model, params, memory, valid, what, length, 1)
    size = memory.shape[0] // (2 if guidance else 1)
    dtype = jnp.promote_types(memory.dtype, jnp.float32)

    def advance(carry, position):
        last, ended, score, cache = carry
        logits, cache = step(jnp.tile(last, 2 if guidance else 1), position, cache)
        guided = logits
        if guidance:
            logits, unshown = jnp.split(logits, 2)
            guided = logits + guidance * (logits - unshown)
        if temperature == 0:
            symbol = guided.argmax(-1)
        else:
            kept = keep_likely(guided / temperature, top_k, top_p)
            symbol = jax.random.categorical(jax.random.fold_in(key, position), kept)
        log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), symbol[:, None], 1)[:, 0]
        symbol = jnp.where(ended, end_id, symbol).astype(jnp.int32)
        score += jnp.where(ended, 0.0, log_prob)
        return (symbol, ended | (symbol == end_id), score, cache), symbol

    start = (jnp.zeros(size, jnp.int32), jnp.zeros(size, bool), jnp.zeros(size, dtype), cache)
    (_, _, score, _), symbols = lax.scan(advance, start, jnp.arange(length))
    return symbols.T, score


def keep_likely(logits: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """Logits [B, W] with all but the k best, and all but the nucleus of probability p, made impossible."""
    if top_k and top_k < logits.shape[-1]:
        least = lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < least, NEVER, logits)
    if top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(ordered), axis=-1) - jax.nn.softmax(ordered)
        kept = (before < top_p) | (jnp.arange(logits.shape[-1]) == 0)  # the best stays whatever p is
        least = jnp.where(kept, ordered, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits < least, NEVER, logits)
    return logits


def _decoder(model, params, memory, valid, what, length, beams):
    """A function (symbol [B * beams], position, cache, origin) -> (logits [B * beams, W], cache), an empty
    cache, and W."""

    def apply(method, *args):
        return model.apply({"params": params}, *args, method=method)

    ready = apply(f"{what}_by_layer", apply(f"{what}_memory", memory))
    cache = apply("empty_cache", what, memory.shape[0], length, memory.dtype, beams)
    size = {"text": model.sizes.vocab_size, "image": model.sizes.num_codes}[what]

    def step(symbol, position, cache, origin=None):
        return apply(f"{what}_step", symbol, position, cache, ready, valid, origin)

    return step, cache, size
