"""What the report's tables hold, out of the flat results of a run. Keys: see `opt_jax.evaluation.report`."""

from collections.abc import Mapping

RETRIEVAL_DIRECTIONS = {
    "image_to_text": "Image → text",
    "text_to_image": "Text → image",
    "text_to_audio": "Text → speech",
    "audio_to_text": "Speech → text",
    "text_audio_to_image": "Text + speech → image",
}
RETRIEVAL_SCORERS = {
    "retrieval": "Best combination",
    "retrieval_both": "Text and speech",
    "retrieval_alignment": "Alignment",
    "retrieval_matching": "Matching",
    "retrieval_likelihood": "Text likelihood",
    "retrieval_information": "Information",
    "retrieval_information_alone": "Information, one picture",
}
# The rows of the other tables, in the paper's order; what is not named here comes after them.
INPUTS = {
    **{name: name for name in ("T", "I", "A", "T+I", "T+A", "I+A", "T+I+A")},
    "audio": "Speech",
    "audio_image": "Speech + image",
    "image": "Image",
    "image_audio": "Image + speech",
    "chance": "Chance",
}
STAGES = ("data", "tokenizer", "detector", "wav2vec2", "dvae", "cache", "pretrain", "evaluation", "report")
CUTOFFS = (1, 5, 10)
BY_CAPTION = ("1_seen", "1_unseen")


def retrieval_table(results: Mapping) -> dict | None:
    """{"scorers": [{"name", "cutoffs"}], "rows": [{"name", "cells" [scorers][cutoffs], "error"}], "chance"}.

    The first scorer has all cutoffs, the others R@1; where results tell them apart, its R@1 over the queries
    whose caption training has seen and has not comes second. "chance" is as the cells of a row, None without
    the size of the pool. The error is the standard error of the first cell, over pools; None where it is
    unknown.
    """
    keys = [
        key
        for key in RETRIEVAL_SCORERS
        if any(name.startswith(f"{key}/") and "R@" in name for name in results)
    ]
    columns = [(key, CUTOFFS if number == 0 else CUTOFFS[:1]) for number, key in enumerate(keys)]
    names = [RETRIEVAL_SCORERS[key] for key in keys]
    if any(name.startswith("retrieval/") and name.endswith(BY_CAPTION) for name in results):
        columns.insert(1, ("retrieval", BY_CAPTION))
        names.insert(1, "By whether training has seen the query's caption")
    rows = []
    for direction, name in RETRIEVAL_DIRECTIONS.items():
        cells = [[results.get(f"{key}/{direction}/R@{k}") for k in ks] for key, ks in columns]
        if any(value is not None for group in cells for value in group):
            error = results.get(f"{keys[0]}/{direction}/R@1_standard_error")
            rows.append({"name": name, "cells": cells, "error": error})
    pool = results.get("retrieval/pool")
    tops = [[1 if k in BY_CAPTION else k for k in ks] for _, ks in columns]
    chance = [[100.0 * min(k, pool) / pool for k in ks] for ks in tops] if pool else None
    shown = [[str(k).replace("_", ", ") for k in ks] for _, ks in columns]
    scorers = [{"name": name, "cutoffs": ks} for name, ks in zip(names, shown, strict=True)]
    return {"scorers": scorers, "rows": rows, "chance": chance} if rows else None


def grid(results: Mapping, prefix: str, chosen: tuple[str, ...] = ()) -> dict | None:
    """Keys prefix/row/column as {"columns", "rows": [{"name", "chance": bool, "values"}]}, chance last.

    `chosen` names the columns to show, where there are more than a reader needs.
    """
    parts = [key.split("/") for key in results if key.startswith(f"{prefix}/") and key.count("/") == 2]
    columns, rows = list(dict.fromkeys(p[2] for p in parts)), list(dict.fromkeys(p[1] for p in parts))
    columns = [column for column in columns if column in chosen] or columns
    rows.sort(key=lambda row: (row == "chance", list(INPUTS).index(row) if row in INPUTS else len(INPUTS)))
    return parts and {
        "columns": columns,
        "rows": [
            {
                "name": INPUTS.get(row, row),
                "chance": row == "chance",
                "values": [results.get(f"{prefix}/{row}/{column}") for column in columns],
            }
            for row in rows
        ],
    }


def question_tables(results: Mapping) -> dict | None:
    """VQA accuracy by what was shown, and by kind of question: {"by_inputs": a table as of `grid`,
    "by_kind": {"chosen" | "written": one, if there are kinds}}. None without any figure."""
    found = {}
    for key, value in results.items():
        score, _, rest = key.partition("/")
        if score == "question_answering" and rest.count("/") == 1:
            found[tuple(rest.split("/"))] = value
    usual = found.pop(("most_frequent", "accuracy"), None)
    sets = list(dict.fromkeys(name for name, _ in found))
    if not sets:
        return None
    rows = [(name, [found.get((name, way)) for way in ("accuracy", "accuracy_written")]) for name in sets]
    by_inputs = [{"name": name, "chance": False, "values": values} for name, values in rows]
    by_inputs.append({"name": "Most frequent answer", "chance": True, "values": [usual, None]})
    by_kind = {"chosen": {"columns": sets, "rows": []}, "written": {"columns": sets, "rows": []}}
    for column in dict.fromkeys(column for _, column in found if column.startswith("accuracy_")):
        kind = column.removeprefix("accuracy_").removeprefix("written").removeprefix("_").replace("_", " ")
        if kind:
            values = [found.get((name, column)) for name in sets]
            way = "written" if column.startswith("accuracy_written") else "chosen"
            by_kind[way]["rows"].append({"name": kind, "chance": False, "values": values})
    return {
        "by_inputs": {"columns": ["chosen", "written"], "rows": by_inputs},
        "by_kind": {way: table for way, table in by_kind.items() if table["rows"]},
    }


def headlines(results: Mapping) -> list[dict]:
    """The few figures to see first: {"name", "value", "beside"}; those that the results lack are left out."""
    pool = results.get("retrieval/pool")
    chance = f"chance {100 / pool:.1f}, pool of {pool:g}" if pool else ""
    pairs = [
        ("Text → image R@1", "retrieval/text_to_image/R@1", chance),
        ("Text → speech R@1", "retrieval/text_to_audio/R@1", chance),
        (
            "Word error rate",
            "speech_recognition/audio/WER",
            _beside(results, "with image", "speech_recognition/audio_image/WER"),
        ),
        ("Caption CIDEr", "captioning/image/CIDEr", _beside(results, "BLEU-4", "captioning/image/BLEU-4")),
        (
            "Questions answered, VQA accuracy",
            "question_answering/T+I/accuracy",
            _beside(results, "written", "question_answering/T+I/accuracy_written"),
        ),
        (*_labels(results), _beside(results, "chance", "classification/chance/mAP")),
        (
            "Named objects drawn",
            "text_to_image/named_objects_found",
            _beside(results, "ceiling", "text_to_image/named_objects_ceiling"),
        ),
    ]
    return [
        {"name": name, "value": results[key], "beside": beside}
        for name, key, beside in pairs
        if key in results
    ]


def generation_rows(results: Mapping) -> list[dict]:
    """Text to image: each figure beside what bounds it."""
    pairs = [
        (
            "Image codes predicted, teacher-forced top-1",
            "code_accuracy",
            "majority code of the cell",
            "code_majority",
        ),
        (
            "Named objects found by the detector",
            "named_objects_found",
            "on reconstructed real pictures",
            "named_objects_ceiling",
        ),
    ]
    return [
        {
            "name": name,
            "value": results[f"text_to_image/{key}"],
            "beside": results.get(f"text_to_image/{other}"),
            "beside_name": other_name,
        }
        for name, key, other_name, other in pairs
        if f"text_to_image/{key}" in results
    ]


def stages(results: Mapping) -> list[dict]:
    """Seconds per stage, in a run's order, and their share in percent: [{"name", "seconds", "share"}]."""
    seconds = {k.removeprefix("seconds/"): float(v) for k, v in results.items() if k.startswith("seconds/")}
    seconds.pop("total", None)
    total = sum(seconds.values()) or 1.0

    def order(name):
        return min((STAGES.index(part) for part in name.split("/") if part in STAGES), default=len(STAGES))

    return [
        {"name": k.removeprefix("encoders/"), "seconds": seconds[k], "share": 100 * seconds[k] / total}
        for k in sorted(seconds, key=order)
    ]


def duration(seconds: float) -> str:
    """12 s, 3 min 20 s, 2 h 5 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s" if seconds % 60 else f"{seconds // 60} min"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


def _beside(results: Mapping, name: str, key: str) -> str:
    return f"{name} {results[key]:.1f}" if key in results else ""


def _labels(results: Mapping) -> tuple[str, str]:
    """Name and key of the labels' card: from pictures alone where there are any, as a text may name them."""
    if "classification/I/mAP" in results:
        return "Labels mAP, picture alone", "classification/I/mAP"
    return "Labels mAP, text + picture + speech", "classification/T+I+A/mAP"


def gains(results: Mapping) -> list[dict]:
    """Figures that a fine-tuned model and the pre-trained one both have: {"name", "before", "after"}."""
    pairs = ((key, results.get(f"before/{key}")) for key in results)
    return [
        {"name": key.replace("/", " ").replace("_", " "), "before": before, "after": results[key]}
        for key, before in pairs
        if isinstance(before, int | float) and isinstance(results[key], int | float)
    ]
