"""The evaluation stage: all figures of results.json, and examples to look at and listen to."""

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from opt_jax.data.loader import Loader
from opt_jax.encoders.faster_rcnn_training import evaluate_detector
from opt_jax.encoders.frozen import load_frozen
from opt_jax.evaluation import pretrained
from opt_jax.evaluation.examples import Examples
from opt_jax.evaluation.pictures import named_objects_found
from opt_jax.evaluation.retrieval import top_k
from opt_jax.evaluation.scorers import Model

# Raised with every change of what a figure means; a run evaluated before that is refused, not kept.
EVALUATION_VERSION = 4
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

    size, test = settings.pool_size, loaders["test"]
    lengths = test.config.buckets[-1]

    def batches(split, rows, batch_size):
        loader = loaders[split]
        return list(loader.evaluation_batches(range(min(rows, len(loader.cache))), batch_size, lengths))

    full = len(test.cache) // size
    if not full:
        raise ValueError(f"a retrieval pool of {size} needs as many test triplets, found {len(test.cache)}")
    pools = batches("test", min(settings.pools, full) * size, size)
    rows = min(settings.validation_pools, len(loaders["validation"].cache) // size) * size
    validation = batches("validation", rows, size)
    say(f"retrieval in {len(pools)} pools of {size}")
    weights = pretrained.best_weights(model, validation or pools[:1], settings.rerank_top)
    options = {"matching_pools": settings.matching_pools, "rerank_top": settings.rerank_top}
    results, best = pretrained.retrieval(model, pools, weights, validation, **options)
    results["retrieval/pool"], results["retrieval/description"] = (
        size,
        describe(weights, settings.rerank_top, bool(validation)),
    )

    rows = [int(row) for row in test.cache.source_row[: settings.texts]]
    triplets = [sources["test"].read(row, image=False, audio=False) for row in rows]
    text_batches = batches("test", settings.texts, settings.batch_size)
    texts = {}
    for name, keep in WRITTEN.items():
        say(f"texts from {name.replace('_', ' and ')}")
        lengths_and_beams = {"max_length": settings.max_new_tokens, "beams": settings.beams}
        texts[name] = pretrained.write_texts(model, text_batches, keep, tokenizer, **lengths_and_beams)
    truths = [triplet.caption for triplet in triplets]
    results |= pretrained.speech_recognition(
        {"audio": texts["audio"], "audio_image": texts["image_audio"]}, truths, settings.pools
    )
    results |= pretrained.captioning(texts, [list(triplet.references) for triplet in triplets])

    say("pictures from texts")
    results |= pretrained.code_accuracy(model, text_batches)
    number = min(settings.pictures, len(test.cache))
    (batch,) = batches("test", number, number)
    codes = model.codes(batch, (True, False, False), settings.seed, top_k=settings.top_k)
    frozen = {name: load_frozen(encoders[name]) for name in ("detector", "dvae")}
    pictured = [sources["test"].read(int(row), audio=False) for row in test.cache.source_row[: len(codes)]]
    found, generated, reconstructed = named_objects_found(frozen, codes, batch["image_codes"], pictured)
    results |= found
    params, detector = frozen["detector"]
    if pictured[0].boxes is not None and len(sources["test"].class_names) == detector["num_classes"]:
        scores = evaluate_detector(params, detector, sources["test"], batch_size=16)
        results |= {f"encoders/detector/test_{name}": value for name, value in scores.items()}

    say("linear probes")
    probe_train = batches("train", settings.probe_train, settings.batch_size)
    held_out = batches("validation", len(loaders["validation"].cache), settings.batch_size)
    probe_test = batches("test", len(test.cache), settings.batch_size)
    results |= pretrained.probe(model, probe_train, held_out, probe_test)

    say("examples")
    examples = Examples(directory, sources["test"])
    for direction, (queries, item) in pretrained.DIRECTIONS.items():
        scores = best[0][direction]
        # Once re-ranked, what is left of the scores is an order.
        reranked = (weights[direction] or weights["text_to_image"]).get("matching")
        for query in range(min(settings.examples, size)):
            items = top_k(scores[query : query + 1], 5)[0]
            examples.retrieval(
                direction,
                queries,
                item,
                rows_of(test, query),
                [rows_of(test, i) for i in items],
                None if reranked else scores[query, items],
            )
    for number in range(min(settings.examples, len(rows))):
        examples.caption(rows[number], {name: texts[name][number] for name in texts})
        examples.transcript(rows[number], texts["audio"][number], texts["image_audio"][number])
    for number in range(min(settings.examples * 2, len(pictured))):
        examples.generated(rows_of(test, number), reconstructed[number], generated[number])
    examples.write()
    say("done")
    return {key: value if isinstance(value, str) else number_or_none(value) for key, value in results.items()}


def rows_of(loader: Loader, row: int) -> int:
    """The row in the source of a row in the cache."""
    return int(loader.cache.source_row[row])


def number_or_none(value) -> float | None:
    return float(value) if np.isfinite(value) else None


def describe(weights: dict, rerank_top: int, on_validation: bool) -> str:
    """The combined scorer in words."""
    parts = [
        f"{direction.replace('_', ' ')}: "
        + (
            " + ".join(f"{weight:g} {name.replace('_', ' ')}" for name, weight in chosen.items() if weight)
            or "as text to image"
        )
        for direction, chosen in weights.items()
    ]
    where = "on validation" if on_validation else "on the first test pool, for want of validation triplets"
    rerank = f"matching orders the best {rerank_top} only" if rerank_top else "matching is not used"
    prior = "how likely a text is at all is taken from the other queries of the pool"
    return f"sum of standardised scorers, weights chosen {where}; {prior}; {rerank} ({'; '.join(parts)})"
