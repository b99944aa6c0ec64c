"""The paper's tables from the working directories of fine-tunings, as Markdown.

    python -m opt_jax.tables runs/tiny_retrieval runs/tiny_retrieval_seed_1 runs/tiny_retrieval_seed_2

Directories of one task on the same data are runs of one configuration with other seeds, and are refused
where they are not, or started from other pre-trainings: figures of several are the mean, with the sample
deviation after ±. A cell is what the pre-trained model could do, where it could, and after the arrow what the
fine-tuned one does. The rows and columns are those of results.json's keys, SCORE/ROW/COLUMN.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from opt_jax.configuration import differences, flatten

# By score: the columns wanted, in their order.
COLUMNS = {
    "classification": ("mAP",),
    "retrieval": ("R@1", "R@5", "R@10", "shortlisted"),
    "retrieval_both": ("R@1", "R@5", "R@10"),
    "retrieval_matching": ("R@1", "R@5", "R@10"),
    "retrieval_alignment": ("R@1", "R@5", "R@10"),
    "captioning": ("BLEU-4", "METEOR-exact", "ROUGE-L", "CIDEr"),
    "speech_recognition": ("WER", "CER"),
    "question_answering": ("accuracy", "accuracy_written"),
    "text_to_image": ("named_objects_found", "named_objects_ceiling", "code_accuracy", "code_perplexity"),
}
COLUMNS |= {f"{name}_to_image": COLUMNS["text_to_image"] for name in ("audio", "text_audio")}
BEFORE = "before/"
OF_ONE_RUN = {"seed", "workdir", "pretrained", "distributed", "predicted_step_seconds", "predicted_minutes"}


class TableError(ValueError):
    """A directory that holds no results of a fine-tuning; the message names it."""


def tables(workdirs: Sequence[Path]) -> str:
    """Markdown, a part for each task and each data. Raises TableError."""
    runs: dict[tuple[str, str], dict[int, dict]] = {}
    first: dict[tuple[str, str], tuple[Path, dict]] = {}
    for workdir in workdirs:
        config, results = (read(Path(workdir) / name) for name in ("config.json", "results.json"))
        if "task" not in config or "data" not in config:
            raise TableError(f"{workdir} is not that of a fine-tuning")
        key = config["task"], described(config["data"])
        other, expected = first.setdefault(key, (workdir, comparable(config)))
        if changed := differences(expected, comparable(config)):
            raise TableError(
                f"{workdir} is no other seed of {other}: {'; '.join(changed)}; make a table of each alone"
            )
        seeds = runs.setdefault(key, {})
        if len({run.get("pretrained") for run in (results, *seeds.values())}) > 1:
            raise TableError(
                f"{workdir} was fine-tuned from another pre-training than {other}; make a table of each alone"
            )
        if config["seed"] in seeds:
            raise TableError(f"{workdir}: another directory is {config['task']} with seed {config['seed']}")
        seeds[config["seed"]] = results
    return "\n\n".join(part(task, data, list(seeds.values())) for (task, data), seeds in runs.items())


def described(data: Mapping) -> str:
    """What a part of the tables calls its data."""
    if data["kind"] == "noise":
        return f"speech in noise, {data['decibels']:g} dB"
    return data["source"] if data["kind"] == "source" else data["kind"]


def comparable(config: Mapping) -> dict:
    """What runs that differ in their seed only have in common.

    A field that is empty counts as one that is not there: older runs lack what was added since.
    """
    kept = {name: value for name, value in config.items() if name not in OF_ONE_RUN}
    return {name: value for name, value in flatten(kept).items() if value not in ("", [], {})}


def part(task: str, data: str, runs: Sequence[Mapping]) -> str:
    """The tables of one task, under a line that says what they are of."""
    number = "one seed" if len(runs) == 1 else f"{len(runs)} seeds"
    found = [f"**{task}** ({data}; {number})"]
    for score, columns in COLUMNS.items():
        keys = [key for key in runs[0] if key.startswith(f"{score}/")]
        short = score.endswith("_to_image")  # SCORE/COLUMN
        rows = [""] if short else list(dict.fromkeys(key.split("/")[1] for key in keys))
        keys = {
            (row, column): "/".join(filter(None, (score, row, column))) for row in rows for column in columns
        }
        columns = [column for column in columns if any(keys[row, column] in runs[0] for row in rows)]
        rows = [row for row in rows if any(keys[row, column] in runs[0] for column in columns)]
        if not columns:
            continue
        lines = [f"| {score} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for row in rows:
            cells = [cell(keys[row, column], runs) for column in columns]
            lines.append(f"| {row.replace('_', ' ')} | {' | '.join(cells)} |")
        found.append("\n".join(lines))
    return "\n\n".join(found)


def cell(key: str, runs: Sequence[Mapping]) -> str:
    """'before → after', each as mean and deviation over the runs; '' for a figure that one of them lacks."""
    sides = [spread([run.get(name) for run in runs]) for name in (BEFORE + key, key)]
    return " → ".join(filter(None, sides))


def spread(values: Sequence[float | None]) -> str:
    """Mean and sample deviation; the deviation is left out where the runs do not differ."""
    if any(value is None for value in values):
        return ""
    if len(set(values)) == 1:
        return f"{values[0]:.1f}"
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"


def read(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise TableError(f"{path} cannot be read ({error}); name the --workdir of a fine-tuning") from error


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(
        "opt_jax.tables", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdirs", nargs="+", type=Path, help="of fine-tunings")
    try:
        print(tables(parser.parse_args(arguments).workdirs))
    except TableError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
