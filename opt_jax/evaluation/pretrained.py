"""Evaluates a pre-trained model, as it is, on held-out triplets: retrieval, speech recognition, captions,
pictures, probe.

Figures are in the paper's units (percent; BLEU and CIDEr times 100), under the keys of results.json.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from opt_jax.evaluation.captioning import caption_scores
from opt_jax.evaluation.classification import (
    chance_mean_average_precision,
    linear_probe,
    mean_average_precision,
)
from opt_jax.evaluation.paired import paired_difference, pools
from opt_jax.evaluation.retrieval import (
    combine,
    debias,
    equal_captions,
    mutual_information,
    ranks,
    recall_at_k,
    rerank,
    top_k,
)
from opt_jax.evaluation.scorers import Model
from opt_jax.evaluation.speech_recognition import error_rates
from opt_jax.metrics_log import progress

DIRECTIONS = {
    "image_to_text": (("image",), "text"),
    "text_to_image": (("text",), "image"),
    "text_to_audio": (("text",), "audio"),
    "audio_to_text": (("audio",), "text"),
    "text_audio_to_image": (("text", "audio"), "image"),
}
INPUT_SETS = {
    "T": (1, 0, 0),
    "I": (0, 1, 0),
    "A": (0, 0, 1),
    "T+I": (1, 1, 0),
    "T+A": (1, 0, 1),
    "I+A": (0, 1, 1),
    "T+I+A": (1, 1, 1),
}
MODALITIES = ("text", "image", "audio")
WEIGHTS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)  # of the other scorers beside alignment's 1, tried on validation
WEIGHT_DECAYS = (1e-3, 1e-2, 1e-1)  # of the linear probe, tried on validation
SHARES = (1.0, 0.5, 0.0)  # of the alignment of all queries beside that of the text alone


def directions(available: Sequence[str]) -> dict[str, tuple]:
    """The directions of retrieval between the modalities that the data has."""
    return {name: (q, item) for name, (q, item) in DIRECTIONS.items() if {*q, item} <= set(available)}


def pool_scores(
    model: Model, batch, available: Sequence[str] = MODALITIES
) -> dict[str, dict[str, np.ndarray]]:
    """Scores [P, P] of all pairs of a pool, by direction and scorer.

    'log_likelihood' of the text, and 'information', the mutual information estimated from it within the pool
    (the text decoder runs on every pair); with alignment layers also 'alignment'. For text+audio to image,
    alignment adds both queries' similarities, 'text_alignment' is that of the text, and the others are of the
    text.
    """
    sources = [name for name in ("image", "audio") if name in available]
    likelihood = {name: model.likelihood(batch, name) for name in sources}
    information = {name: mutual_information(matrix) for name, matrix in likelihood.items()}
    scores = {}
    for name, (queries, item) in directions(available).items():
        other = item if "text" in queries else queries[0]
        found = {"log_likelihood": likelihood[other], "information": information[other]}
        scores[name] = {key: x.T if "text" in queries else x for key, x in found.items()}
    if model.model.config["num_alignment_layers"]:
        unit = model.embeddings(batch)
        for name, (queries, item) in directions(available).items():
            scores[name]["alignment"] = sum(unit[query] for query in queries) @ unit[item].T
            if len(queries) > 1:
                scores[name]["text_alignment"] = unit["text"] @ unit[item].T
    return scores


def best_weights(
    model: Model, batches, rerank_top: int, available: Sequence[str] = MODALITIES
) -> dict[str, dict[str, float]]:
    """For each direction the weights that rank best (R@1, then R@5) on validation pools.

    First those of information and alignment, then that of matching in re-ranking the first `rerank_top` of
    their sum. Simpler is kept unless more is clearly better (R@1, by over one paired standard error):
    information alone, no re-ranking, and (here by over two) for a text with speech the ranking by the text:
    then its weights have `as_text`, and are those of both all the same. 0 leaves a scorer out.
    """
    scored = [pool_scores(model, batch, available) for batch in progress(batches, desc="weights: pools")]
    correct = [_correct(batch) for batch in batches]
    chosen, ranked = {}, {}
    for direction, (queries, _) in progress(directions(available).items(), desc="weights: directions"):
        names = scored[0][direction]
        options = [{"information": 1.0}]
        if "text_alignment" in names:
            alignments = [{"alignment": share, "text_alignment": 1 - share} for share in SHARES]
        else:
            alignments = [{"alignment": 1.0}] if "alignment" in names else []
        options += [part | {"information": weight} for part in alignments for weight in WEIGHTS]
        totals = {
            i: [combined(scores[direction], weights) for scores in scored]
            for i, weights in enumerate(options)
        }
        best = clearly_best(totals, 0, correct)
        weights, total = options[best], totals[best]
        if rerank_top:
            tops = [
                matching_top(model, batch, direction, scores, rerank_top)
                for batch, scores in zip(batches, total, strict=True)
            ]
            reranked = {
                weight: [reordered(x, *top, weight) for x, top in zip(total, tops, strict=True)]
                for weight in (0.0, *WEIGHTS[1:])
            }
            matching = clearly_best(reranked, 0.0, correct)
            weights, total = weights | {"matching": matching}, reranked[matching]
        if len(queries) > 1:
            both_and_text = {"both": total, "text": ranked["text_to_image"]}
            # Both were chosen among many more ways than the text alone, and so look better than they are.
            if clearly_best(both_and_text, "text", correct, errors=2.0) == "text":
                weights, total = weights | {"as_text": 1.0}, ranked["text_to_image"]
        chosen[direction], ranked[direction] = weights, total
    return chosen


def clearly_best(totals: dict, simple, correct: list[np.ndarray], errors: float = 1.0):
    """The key of the pools [P, P] in `totals` that rank best, or `simple` where its R@1 is not lower by more
    than so many standard errors of the difference, paired over the queries."""

    def quality(key):
        recalls = [recall_at_k(total, truth) for total, truth in zip(totals[key], correct, strict=True)]
        return [float(np.mean([recall[k] for recall in recalls])) for k in ("R@1", "R@5")]

    def found(key):
        return np.concatenate([ranks(x, truth) == 0 for x, truth in zip(totals[key], correct, strict=True)])

    best = max(totals, key=quality)
    gain = found(best).astype(np.float64) - found(simple)
    return best if gain.mean() > errors * gain.std() / np.sqrt(len(gain)) else simple


def matching_top(model: Model, batch, direction: str, total: np.ndarray, number: int):
    """The best items [P, number] of a direction by `total` [P, P], and matching's scores of them."""
    queries, item = DIRECTIONS[direction]
    items = top_k(total, number)
    return items, model.matching(batch, queries, item, items)


def reordered(total: np.ndarray, items: np.ndarray, matching: np.ndarray, weight: float) -> np.ndarray:
    """`total` [P, P] with `items` [P, k] put in the order of its sum with weighted matching scores [P, k]."""
    if not weight:
        return total
    return rerank(total, items, combine([np.take_along_axis(total, items, 1), matching], [1.0, weight]))


def combined(scores: dict[str, np.ndarray], weights: dict[str, float]) -> np.ndarray:
    """Weighted sum of standardised scorers [P, P]."""
    return combine([scores[name] for name in weights], list(weights.values()))


def retrieval(
    model: Model,
    batches,
    weights,
    others,
    *,
    matching_pools: int,
    rerank_top: int,
    available: Sequence[str] = MODALITIES,
    known_captions: np.ndarray | None = None,
) -> tuple[dict, list]:
    """Recall at 1, 5 and 10 of every scorer and direction, the mean over pools; and the best scores, for
    looking at.

    `retrieval/` is the sum of information and alignment with `weights`; where matching has a weight, the best
    `rerank_top` items are put in the order of the sum with it; with `as_text` a text with speech ranks as the
    text, and `retrieval_both/` is what both give. `retrieval_likelihood/` is the log-likelihood of the text
    minus its mean over the queries. `retrieval_information_alone/image_to_text` takes how likely
    a text is at all from the pictures of the batches `others`, if there are any, and not from the other
    queries: what one picture alone could be asked. `retrieval_matching/` scores all pairs of the first
    `matching_pools` pools. known_captions: keys of the training captions; `retrieval/.../R@k_seen` and
    `_unseen` are over the queries whose caption is among them or not, where there are both.
    Returns: results, and for each pool {direction: scores [P, P]}.
    """
    recalls, best = {}, []

    def note(scorer, direction, scores, correct, suffix=""):
        for key, value in recall_at_k(scores, correct).items():
            recalls.setdefault(f"{scorer}/{direction}/{key}{suffix}", []).append(value)

    for batch in progress(batches, desc="retrieval: pools"):
        scores, correct = pool_scores(model, batch, available), _correct(batch)
        best.append({})
        for direction in directions(available):
            found = scores[direction]
            note("retrieval_likelihood", direction, debias(found["log_likelihood"]), correct)
            for scorer in ("information", "alignment"):
                if scorer in found:
                    note(f"retrieval_{scorer}", direction, found[scorer], correct)
            chosen = dict(weights[direction])
            matching, as_text = chosen.pop("matching", 0.0), chosen.pop("as_text", 0.0)
            total = combined(found, chosen)
            if matching:
                total = reordered(total, *matching_top(model, batch, direction, total, rerank_top), matching)
            if len(directions(available)[direction][0]) > 1:
                note("retrieval_both", direction, total, correct)
            if as_text:
                total = best[-1]["text_to_image"]
            note("retrieval", direction, total, correct)
            best[-1][direction] = total
            for part, rows in seen_and_unseen(batch["caption_key"], known_captions).items():
                note("retrieval", direction, total[rows], correct[rows], f"_{part}")
        if others and "image" in available:
            texts = {name: batch[name] for name in ("text_ids", "text_valid")}
            elsewhere = np.concatenate([model.likelihood(other | texts, "image") for other in others])
            alone = mutual_information(scores["image_to_text"]["log_likelihood"], elsewhere)
            note("retrieval_information_alone", "image_to_text", alone, correct)
    compared = list(itertools.product(batches[:matching_pools], matched(available)))
    for batch, (queries, item) in progress(compared, desc="retrieval: all pairs", disable=not compared):
        matrix, correct = model.matching(batch, queries, item), _correct(batch)
        note("retrieval_matching", f"{'_'.join(queries)}_to_{item}", matrix, correct)
        if queries == ("text",):
            note("retrieval_matching", f"{item}_to_text", matrix.T, correct)
    results = {key: float(np.mean(values)) for key, values in recalls.items()} | _spread(recalls)
    names = ["retrieval_both/text_audio_to_image/R@1", "retrieval/text_to_image/R@1"]
    if set(names) <= set(recalls):
        results |= _paired("R@1 of text+audio minus text to image", *(recalls[name] for name in names))
    return results, best


def seen_and_unseen(keys: np.ndarray, known: np.ndarray | None) -> dict[str, np.ndarray]:
    """Rows {'seen': int [n], 'unseen': int [m]}: caption key in `known` or not; {} where one is empty."""
    seen = np.isin(keys, () if known is None else known)
    rows = {"seen": np.flatnonzero(seen), "unseen": np.flatnonzero(~seen)}
    return rows if all(map(len, rows.values())) else {}


def matched(available: Sequence[str] = MODALITIES) -> list[tuple]:
    """The directions (queries, item) that matching has to score; its scores of a pair hold both ways."""
    return [(queries, item) for queries, item in directions(available).values() if "text" in queries]


def _spread(recalls: dict[str, list[float]]) -> dict[str, float]:
    """Standard errors over pools of the R@1 under `retrieval/`, as
    retrieval/<direction>/R@1_standard_error."""
    chosen = {
        key: values for key, values in recalls.items() if key.startswith("retrieval/") and key.endswith("R@1")
    }
    return {
        f"{key}_standard_error": float(np.std(values, ddof=1) / np.sqrt(len(values)))
        for key, values in chosen.items()
        if len(values) > 1
    }


def _paired(name: str, one: list[float], other: list[float]) -> dict[str, float]:
    """{paired/<name>: mean difference over the same pools, .../standard_error}; nothing for a single pool."""
    if len(one) < 2:
        return {}
    difference, error = paired_difference(one, other)
    return {f"paired/{name}": difference, f"paired/{name}/standard_error": error}


def _correct(batch) -> np.ndarray:
    return equal_captions(batch["caption_key"], batch["caption_key"])


def write_texts(model: Model, batches, keep, tokenizer, *, max_length: int, beams: int) -> list[str]:
    """The texts that the model writes for the modalities in `keep`, one for each real row of the batches."""
    options = {
        "max_length": max_length,
        "end_id": tokenizer.sep_id,
        "pad_id": tokenizer.pad_id,
        "beams": beams,
    }
    texts = []
    for batch in progress(batches, desc="texts"):
        ids = model.text(batch, keep, **options)
        texts += [tokenizer.decode([int(i) for i in row]) for row in ids[np.asarray(batch["row_valid"])]]
    return texts


def speech_recognition(
    texts: dict[str, list[str]], truths: list[str], number_of_pools: int, parts: dict[str, np.ndarray]
) -> dict[str, float]:
    """WER and CER of transcripts {'audio': ..., 'audio_image': ...}, and what the image changes, with its
    error over `number_of_pools` parts of the transcripts; and the WER of `parts`, rows by name."""
    results = {}
    for source, hypotheses in texts.items():
        for name, value in error_rates(truths, hypotheses).items():
            results[f"speech_recognition/{source}/{name}"] = value
        for part, rows in parts.items():
            found = error_rates([truths[i] for i in rows], [hypotheses[i] for i in rows])
            results[f"speech_recognition/{source}/WER_{part}"] = found["WER"]
    if len(texts) < 2:
        return results
    rates = {source: [] for source in texts}
    for pool in pools(len(truths), min(number_of_pools, len(truths))):
        for source, hypotheses in texts.items():
            part = error_rates([truths[i] for i in pool], [hypotheses[i] for i in pool])
            rates[source].append(part["WER"])
    return results | _paired("WER of audio+image minus audio", rates["audio_image"], rates["audio"])


def captioning(texts: dict[str, list[str]], references: list[list[str]]) -> dict[str, float]:
    """`caption_scores` of captions {'image': ..., 'audio': ..., 'image_audio': ...} against several
    references each."""
    results = {}
    for source, candidates in texts.items():
        for name, value in caption_scores(candidates, references).items():
            results[f"captioning/{source}/{name}"] = value
    return results


def code_accuracy(model: Model, batches, keep=(True, False, False)) -> dict[str, float]:
    """Teacher-forced top-1 accuracy of the image codes given the modalities in `keep`, by default the text,
    beside the best constant picture (majority per cell), over the pictures that have codes."""
    predicted, true = [], []
    for batch in batches:
        real = np.asarray(batch["row_valid"]) & (np.asarray(batch["image_codes"]) >= 0).all(1)
        predicted.append(model.code_predictions(batch, keep)[real])
        true.append(np.asarray(batch["image_codes"])[real])
    predicted, true = np.concatenate(predicted), np.concatenate(true)
    majority = np.array([np.bincount(cell).argmax() for cell in true.T])
    return {
        "text_to_image/code_accuracy": 100 * float((predicted == true).mean()),
        "text_to_image/code_majority": 100 * float((majority == true).mean()),
    }


def probe(
    model: Model,
    train_batches,
    validation_batches,
    test_batches,
    available: Sequence[str] = MODALITIES,
    sets: Sequence[str] = tuple(INPUT_SETS),
) -> dict[str, float]:
    """mAP of a linear probe for each of `sets`, input modalities (the paper's table 2), beside chance.

    Larger sets have wider features, so each set has the weight decay that does best on validation.
    """
    splits = [list(batches) for batches in (train_batches, validation_batches, test_batches)]

    def gather(batches, rows_of):
        parts = [np.asarray(rows_of(batch))[np.asarray(batch["row_valid"])] for batch in batches]
        return np.concatenate(parts) if parts else np.zeros((0, 1))

    train_labels, validation_labels, test_labels = (gather(part, lambda b: b["labels"]) for part in splits)
    results = {"classification/chance/mAP": chance_mean_average_precision(test_labels)}
    shown = [name for name in sets if set(itertools.compress(MODALITIES, INPUT_SETS[name])) <= set(available)]
    for name in progress(shown, desc="probes"):
        keep = tuple(map(bool, INPUT_SETS[name]))
        train, validation, test = (gather(p, lambda b, k=keep: model.probe_features(b, k)) for p in splits)

        def tried(decay, features, labels, train=train):
            scores = linear_probe(train, train_labels, features, weight_decay=decay)
            return mean_average_precision(scores, labels)["mAP"]

        decay = WEIGHT_DECAYS[0]
        if len(validation):
            decay = max(WEIGHT_DECAYS, key=lambda d, v=validation: tried(d, v, validation_labels))
        results[f"classification/{name}/mAP"] = tried(decay, test, test_labels)
    return results
