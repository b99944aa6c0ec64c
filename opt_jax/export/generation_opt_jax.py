"""Decoding of text and of image codes with cached keys and values: greedy, beam search, and sampling.

A `step` is a function (symbol [R] or None, past or None) -> (logits [R, W], past); see `Decoder.step`.
"""

import numbers
from collections.abc import Callable

import torch
from torch import Tensor

NEVER = -1e9


def search(
    step: Callable,
    batch: int,
    *,
    max_length: int,
    end_id: int,
    pad_id: int,
    num_beams: int,
    length_penalty: float,
) -> tuple[Tensor, Tensor]:
    """The most likely sequence of each row: greedy with one beam, beam search with several.

    Args:
      step: for `batch` * `num_beams` rows. max_length: symbols to decode at most, with the end symbol.
      num_beams: hypotheses kept alive. One that ends among the best `num_beams` is finished and leaves; a row
        is done with `num_beams` finished ones.
      length_penalty: a hypothesis scores its log-probability divided by its length to this power.
    Returns: ids [B, max_length] (the end symbol, then pad_id), log-probability [B].
    """
    logits, past = step(None, None)
    size = logits.shape[-1]
    rows = torch.arange(batch, device=logits.device)
    never = logits.new_full((batch,), NEVER)
    ids = torch.full((batch, num_beams, max_length), pad_id, device=logits.device)
    log_probs = logits.new_full((batch, num_beams), NEVER)
    log_probs[:, 0] = 0  # all beams start equal: only the first counts
    best = ids[:, 0], never, never  # the best finished hypothesis: ids, log-probability, score
    finished = torch.zeros_like(rows)
    position = 0

    def better(best, ids, log_probs, counts):
        """The best of each row's finished hypothesis and these [B, N], where `counts` [B, N] is set."""
        scores = (log_probs / position**length_penalty).masked_fill(~counts, NEVER)
        first = scores.argmax(1)
        improves = scores[rows, first] > best[2]
        new = ids[rows, first], log_probs[rows, first], scores[rows, first]
        return (
            torch.where(improves[:, None], new[0], best[0]),
            torch.where(improves, new[1], best[1]),
            torch.where(improves, new[2], best[2]),
        )

    while True:
        total = log_probs[..., None] + logits.log_softmax(-1).view(batch, num_beams, size)
        # At most one continuation of each beam ends, so of twice as many as beams enough go on.
        log_probs, chosen = total.flatten(1).topk(2 * num_beams)
        parent, symbol = chosen // size, chosen % size
        ids = ids[rows[:, None], parent]
        ids[:, :, position] = symbol
        position += 1
        ends = symbol == end_id
        among_best = torch.arange(2 * num_beams, device=ids.device) < num_beams
        counts = ends & among_best & (finished < num_beams)[:, None]
        best = better(best, ids, log_probs, counts)
        finished = finished + counts.sum(1)
        log_probs, kept = log_probs.masked_fill(ends, NEVER).topk(num_beams)
        ids, parent, symbol = ids[rows[:, None], kept], parent.gather(1, kept), symbol.gather(1, kept)
        if position == max_length or bool((finished >= num_beams).all()):
            break
        source = (rows[:, None] * num_beams + parent).flatten()
        past = [(keys[source], values[source]) for keys, values in past]
        logits, past = step(symbol.flatten(), past)
    # A row that ran out of positions may also give what has not ended.
    counts = (finished < num_beams)[:, None].expand_as(log_probs)
    ids, log_prob, _ = better(best, ids, log_probs, counts)
    return ids, log_prob


def sample(
    step: Callable,
    length: int,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    end_id: int = -1,
    generator: torch.Generator | None = None,
    noise: Callable | None = None,
    guidance: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Draws a sequence symbol by symbol.

    Args:
      length: symbols to draw. temperature: divides the logits; 0 takes the best symbol.
      top_k: draws among the k best only, 0 for all. top_p: draws among the fewest symbols whose probability
        reaches p.
      end_id: symbol after which a sequence is done, -1 for none. generator: of the random numbers.
      noise: in its place, a function (step, (B, W)) -> Gumbel noise in numpy, which is added to the logits.
      guidance: w of classifier-free guidance (arXiv 2207.12598): the logits are moved by w times their
        difference from those of a model that is shown nothing. `step` then is for 2 B rows, of which the
        second half is shown nothing.
    Returns: symbols [B, length] (end_id repeated after the end), log-probability [B] under the model,
    unfiltered.
    """
    symbol, past, drawn = None, None, []
    for position in range(length):
        last = symbol.repeat(2) if guidance and symbol is not None else symbol
        logits, past = step(last, past)
        guided = logits
        if guidance:
            logits, unshown = logits.chunk(2)
            guided = logits + guidance * (logits - unshown)
        if temperature == 0:
            chosen = guided.argmax(-1)
        else:
            likely = keep_likely(guided / temperature, top_k, top_p)
            if noise is None:
                chosen = torch.multinomial(likely.softmax(-1), 1, generator=generator)[:, 0]
            else:
                drawing = torch.from_numpy(noise(position, tuple(likely.shape)))
                chosen = (likely + drawing.to(likely)).argmax(-1)
        gained = logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0]
        if symbol is None:
            ended, log_prob = torch.zeros_like(chosen, dtype=torch.bool), torch.zeros_like(gained)
        log_prob = log_prob + gained.masked_fill(ended, 0)
        symbol = chosen.masked_fill(ended, end_id)
        ended = ended | (symbol == end_id)
        drawn.append(symbol)
    return torch.stack(drawn, 1), log_prob


def keep_likely(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits [B, W] with all but the k best, and all but the nucleus of probability p, made impossible."""
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k)[0][:, -1:]
        logits = logits.masked_fill(logits < least, NEVER)
    if top_p < 1:
        ordered = logits.sort(-1, descending=True)[0]
        probabilities = ordered.softmax(-1)
        kept = probabilities.cumsum(-1) - probabilities < top_p
        kept[:, 0] = True  # the best stays whatever p is
        least = ordered.masked_fill(~kept, torch.inf).min(-1, keepdim=True)[0]
        logits = logits.masked_fill(logits < least, NEVER)
    return logits


def padded_after(ids: Tensor, end_id: int, pad_id: int) -> Tensor:
    """ids [B, N] with pad_id after the first end symbol."""
    ends = (ids == end_id).long()
    return ids.masked_fill(ends.cumsum(1) - ends > 0, pad_id)


def counted(name: str, value, default: int) -> int:
    """A number of things, by default `default`. Raises: ValueError: it is no whole number from 1 on."""
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name} is {value!r}, expected a whole number from 1 on")
    return int(value)
