"""The evaluation stage: all figures of results.json, and examples to look at and listen to."""

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from opt_jax.cache.manifest import CacheError
from opt_jax.cache.reader import FeatureCache
from opt_jax.data.loader import Loader
from opt_jax.encoders.faster_rcnn_training import evaluate_detector
from opt_jax.encoders.frozen import load_frozen
from opt_jax.evaluation import pretrained
from opt_jax.evaluation.examples import Examples
from opt_jax.evaluation.pictures import named_objects_found
from opt_jax.evaluation.retrieval import top_k
from opt_jax.evaluation.scorers import Model

# Raised with every change of what a figure means; a run evaluated before that is refused, not kept.
EVALUATION_VERSION = 9
WRITTEN = {"audio": (False, False, True), "image": (False, True, False), "image_audio": (False, True, True)}


def evaluate(
    settings,
    directory: Path,
    sources: Mapping,
    loaders: Mapping[str, Loader],
    tokenizer,
    encoders,
    model: Model,
) -> dict:
    """Evaluates on the test split; weights of the combined retrieval scorer are chosen on validation.

    Args:
      settings: the `evaluation` part of the configuration. directory: gets examples.json and its media.
      sources, loaders: by split. encoders: directories of the frozen encoders by name.
    Returns: flat results; texts under 'retrieval/description'.
    """
    started = time.time()

    def say(what):
        print(f"evaluation: {what} ({time.time() - started:.0f} s)", flush=True)

    test = loaders["test"]
    available = available_modalities(test.cache)
    usable = {split: complete_rows(loader.cache, available) for split, loader in loaders.items()}
    looked_at = usable | {"train": usable["train"][: settings.probe_train]}
    lengths = longest(loaders, looked_at)

    def batches(split, rows, batch_size):
        return list(loaders[split].evaluation_batches(rows, batch_size, lengths))

    results, best, weights = evaluate_retrieval(settings, model, loaders, say)
    held_out = usable["validation"]
    known = loaders["train"].cache.caption_keys

    chosen = usable["test"][: settings.texts]
    rows = [rows_of(test, row) for row in chosen]
    triplets = [sources["test"].read(row, image=False, audio=False) for row in rows]
    text_batches = batches("test", chosen, settings.batch_size)
    texts = {}
    for name, keep in WRITTEN.items():
        if {m for m, kept in zip(pretrained.MODALITIES, keep, strict=True) if kept} <= set(available):
            say(f"texts from {name.replace('_', ' and ')}")
            options = {"max_length": settings.max_new_tokens, "beams": settings.beams}
            texts[name] = pretrained.write_texts(model, text_batches, keep, tokenizer, **options)
    truths = [triplet.caption for triplet in triplets]
    if "audio" in texts:
        spoken = {"audio": "audio", "audio_image": "image_audio"}
        transcripts = {key: texts[name] for key, name in spoken.items() if name in texts}
        parts = pretrained.seen_and_unseen(test.cache.caption_keys[chosen], known)
        results |= pretrained.speech_recognition(transcripts, truths, settings.pools, parts)
    results |= pretrained.captioning(texts, [list(triplet.references) for triplet in triplets])

    drawn = drawable(text_batches)[: settings.pictures]
    pictured, reconstructed, generated = [], [], []
    frozen = {name: load_frozen(encoders[name]) for name in ("detector", "dvae") if name in encoders}
    if len(drawn):
        say("pictures from texts")
        results |= pretrained.code_accuracy(model, text_batches)
        (batch,) = batches("test", drawn, len(drawn))
        codes = model.codes(batch, (True, False, False), settings.seed, top_k=settings.top_k)
        pictured = [sources["test"].read(rows_of(test, row), audio=False) for row in drawn]
        found, generated, reconstructed = named_objects_found(frozen, codes, batch["image_codes"], pictured)
        results |= found
    if "detector" in frozen:
        params, detector = frozen["detector"]
        boxes = pictured and pictured[0].boxes is not None
        if boxes and len(sources["test"].class_names) == detector["num_classes"]:
            say("the detector on pictures")
            scores = evaluate_detector(params, detector, sources["test"], batch_size=16)
            results |= {f"encoders/detector/test_{name}": value for name, value in scores.items()}

    if sources["test"].class_names:
        say("linear probes")
        splits = {"train": usable["train"][: settings.probe_train], "validation": held_out}
        splits["test"] = usable["test"]
        tried = (batches(split, rows, settings.batch_size) for split, rows in splits.items())
        results |= pretrained.probe(model, *tried, available)

    say("examples")
    examples = Examples(directory, sources["test"])
    show_retrieval(examples, test, best[0], weights, settings.examples)
    for number in range(min(settings.examples, len(rows))):
        written = {name: texts[name][number] for name in texts}
        examples.caption(rows[number], written, available)
        if "audio" in available:
            examples.transcript(rows[number], written)
    for number in range(min(settings.examples * 2, len(pictured))):
        examples.generated(rows_of(test, drawn[number]), reconstructed[number], {"text": generated[number]})
    examples.write()
    say("done")
    return {key: value if isinstance(value, str) else number_or_none(value) for key, value in results.items()}


def evaluate_retrieval(settings, model: Model, loaders: Mapping[str, Loader], say) -> tuple[dict, list, dict]:
    """Retrieval in pools of the test split, by every scorer and by their best combination on validation.

    Args:
      settings: pool_size, pools, matching_pools, validation_pools, rerank_top. say: told what is done.
    Returns: results; for each pool {direction: scores [P, P]} of the combination; its weights.
    """
    test, validation = loaders["test"], loaders["validation"]
    available = available_modalities(test.cache)
    rows, held_out = (complete_rows(loader.cache, available) for loader in (test, validation))
    size = min(settings.pool_size, len(rows))
    if size < settings.pool_size:
        say(f"only {size} test rows have {' and '.join(available)}: they make one pool")
    lengths = longest(loaders, {"test": rows, "validation": held_out})
    number = min(settings.pools, len(rows) // size)
    pools = list(test.evaluation_batches(rows[: number * size], size, lengths))
    held_out = held_out[: min(settings.validation_pools, len(held_out) // size) * size]
    others = list(validation.evaluation_batches(held_out, size, lengths))
    say(f"retrieval in {len(pools)} pools of {size}")
    weights = pretrained.best_weights(model, others or pools[:1], settings.rerank_top, available)
    options = {"matching_pools": settings.matching_pools, "rerank_top": settings.rerank_top}
    options |= {"available": available, "known_captions": loaders["train"].cache.caption_keys}
    results, best = pretrained.retrieval(model, pools, weights, others, **options)
    described = describe(weights, settings.rerank_top, bool(others))
    return results | {"retrieval/pool": size, "retrieval/description": described}, best, weights


def show_retrieval(examples: Examples, test: Loader, best: Mapping, weights: Mapping, number: int) -> None:
    """What the first `number` queries of a pool, find; `best` scores and `weights` by direction."""
    available = available_modalities(test.cache)
    rows = complete_rows(test.cache, available)
    for direction, (queries, item) in pretrained.directions(available).items():
        scores = best[direction]
        # Once re-ranked, what is left of the scores is an order.
        ranked_by = "text_to_image" if weights[direction].get("as_text") else direction
        reranked = weights[ranked_by].get("matching")
        for query in range(min(number, len(scores))):
            items = top_k(scores[query : query + 1], 5)[0]
            examples.retrieval(
                direction,
                queries,
                item,
                rows_of(test, rows[query]),
                [rows_of(test, rows[i]) for i in items],
                None if reranked else scores[query, items],
            )


def available_modalities(cache: FeatureCache) -> tuple[str, ...]:
    """The modalities that the evaluation on a split is about: all that occur, or, where no two rows have all
    of them, text with the one that more rows have. Raises CacheError where there is no such pair."""
    present = cache.presence.any(axis=0)
    every = tuple(name for name, some in zip(pretrained.MODALITIES, present, strict=True) if some)
    pairs = [("text", name) for name in every if name != "text" and "text" in every]
    pairs.sort(key=lambda pair: -len(complete_rows(cache, pair)))
    for names in (every, *pairs):
        if len(names) > 1 and "text" in names and len(complete_rows(cache, names)) > 1:
            return names
    raise CacheError(
        f"the usable rows of the split {cache.manifest.split!r} have {', '.join(every) or 'nothing'};"
        " evaluation needs at least two that have text with a picture or a recording"
    )


def complete_rows(cache: FeatureCache, names) -> np.ndarray:
    """Rows of the cache [n] that have all of these modalities."""
    needed = np.isin(pretrained.MODALITIES, names)
    return np.flatnonzero(cache.presence[:, needed].all(axis=1))


def longest(loaders: Mapping[str, Loader], rows: Mapping[str, np.ndarray]) -> tuple[int, int]:
    """Text and audio positions (T, A) that hold these rows of the caches, and at most those of the longest
    batches of training: scoring all pairs is mostly about how long they are."""
    found = [(1, 1)]
    for split, chosen in rows.items():
        loader = loaders[split]
        lengths = loader.cache.text_lengths[chosen], loader.audio_lengths[chosen]
        found.append([int(length.max(initial=1)) for length in lengths])
    return tuple(map(min, np.max(found, axis=0).tolist(), loaders["test"].config.buckets[-1]))


def drawable(batches) -> np.ndarray:
    """Rows of the cache, of those in some batches, whose picture has codes."""
    rows = [batch["index"][(batch["image_codes"] >= 0).all(1) & batch["present"][:, 1]] for batch in batches]
    return np.concatenate(rows)


def rows_of(loader: Loader, row: int) -> int:
    """The row in the source of a row in the cache."""
    return int(loader.cache.source_row[row])


def number_or_none(value) -> float | None:
    return float(value) if np.isfinite(value) else None


def describe(weights: dict, rerank_top: int, on_validation: bool) -> str:
    """The combined scorer in words."""
    parts = []
    for direction, chosen in weights.items():
        scorers = {name: weight for name, weight in chosen.items() if weight and name != "as_text"}
        total = " + ".join(f"{weight:g} {name.replace('_', ' ')}" for name, weight in scorers.items())
        kept = f"as text to image, which on validation was no worse than {total}"
        parts.append(f"{direction.replace('_', ' ')}: {kept if chosen.get('as_text') else total}")
    where = "on validation" if on_validation else "on the first test pool, for want of validation triplets"
    rerank = f"matching orders the best {rerank_top} only" if rerank_top else "matching is not used"
    prior = "how likely a text is at all is taken from the other queries of the pool"
    return f"sum of standardised scorers, weights chosen {where}; {prior}; {rerank} ({'; '.join(parts)})"
