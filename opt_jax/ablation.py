"""The ablation of the objectives (OPT, table 5): pre-training without one family at a time, everything else
the same, on the features of a pre-training that is there.

PRETRAINED/{config.json, data, encoders, cache} -> workdir/CELL/{checkpoints, evaluation} of each cell, which
are skipped where they are done -> workdir/results.json, workdir/table.md
"""

import functools
from pathlib import Path

from opt_jax.cache.reader import FeatureCache
from opt_jax.checkpoints import parameters_digest
from opt_jax.evaluation import pretrained
from opt_jax.evaluation.run import (
    EVALUATION_VERSION,
    available_modalities,
    complete_rows,
    evaluate_retrieval,
    longest,
)
from opt_jax.evaluation.scorers import Model
from opt_jax.pipeline import (
    SPLITS,
    make_loader,
    make_sources,
    pretrain,
    region_positions,
    training_weights,
)
from opt_jax.stages import run_stage, write_record
from opt_jax.tasks.validation import FULL
from opt_jax.trained import load_trained

BEST = "best combination"
SCORERS = {BEST: "retrieval"} | {
    name: f"retrieval_{name}" for name in ("alignment", "likelihood", "matching")
}


def run(config, workdir) -> dict:
    """Trains and evaluates every cell; returns {cell: results}. `config` is that of configs/ablation.py."""
    workdir = Path(workdir)
    setup = load_trained(config.pretrained)
    caches = {split: FeatureCache(setup.directory / "cache" / split / "features") for split in SPLITS}
    encoders = {name: path for name, path in setup.encoders.items() if path}
    weights = training_weights(setup.config, make_sources(setup.config, setup.directory)["train"])
    results = {}
    for cell, left_out in {FULL: (), **config.families}.items():
        directory = workdir / cell.replace(" ", "_")
        directory.mkdir(parents=True, exist_ok=True)
        settings = setup.config.copy_and_resolve_references()
        settings.train.steps, settings.train.checkpoint_every = config.steps, config.steps
        settings.train.warmup_steps = min(settings.train.warmup_steps, config.steps // 10)
        settings.seed = config.seed
        for name in left_out:
            settings.objectives.weights[name] = 0.0
        print(f"ablation: {cell}", flush=True)
        data = settings, directory, caches, setup.tokenizer, encoders
        params, model, statistics = pretrain(*data, weights)
        loaders = {
            split: make_loader(settings, cache, region_positions(settings, caches), whole=True)
            for split, cache in caches.items()
        }

        scorers = Model(model, params, statistics)
        build = functools.partial(evaluate, config.evaluation, scorers, loaders)
        inputs = {
            "parameters": parameters_digest(params),
            "evaluation": config.evaluation.to_dict(),
            "version": EVALUATION_VERSION,
        }
        results[cell] = run_stage("evaluation", directory / "evaluation", inputs, build, collective=False)
        # Not before: what refuses other settings leaves those that made the results.
        write_record(workdir / "config.json", config.to_dict())
        write_record(workdir / "results.json", results)
    text = table(results)
    (workdir / "table.md").write_text(text + "\n")
    print(text, flush=True)
    return results


def evaluate(settings, model: Model, loaders, _: Path) -> dict:
    """Retrieval, and where there are labels a linear probe of all modalities that the data have."""

    def say(what):
        print(f"ablation: {what}", flush=True)

    results, _, _ = evaluate_retrieval(settings, model, loaders, say)
    if not loaders["test"].cache.class_names:
        return results
    available = available_modalities(loaders["test"].cache)
    rows = {split: complete_rows(loader.cache, available) for split, loader in loaders.items()}
    rows["train"] = rows["train"][: settings.probe_train]
    lengths = longest(loaders, rows)
    batches = [
        list(loaders[split].evaluation_batches(rows[split], settings.batch_size, lengths)) for split in SPLITS
    ]
    letters = "+".join(
        letter for letter, m in zip("TIA", pretrained.MODALITIES, strict=True) if m in available
    )
    return results | pretrained.probe(model, *batches, available, (letters,))


def table(results: dict[str, dict]) -> str:
    """Markdown: a line for each cell; the labels' mAP beside the best combination's R@1 by direction, then
    the R@1 of each scorer alone. After ± one standard error over the pools."""
    labels = sorted({key for found in results.values() for key in found if key.startswith("classification/")})
    head = {f"mAP {key.split('/')[1]}": key for key in labels if "chance" not in key}
    recalls = {
        (scorer, direction): f"{prefix}/{direction}/R@1"
        for scorer, prefix in SCORERS.items()
        for direction in pretrained.DIRECTIONS
    }
    best = {d.replace("_", " "): key for (scorer, d), key in recalls.items() if scorer == BEST}
    alone = {
        f"{direction.replace('_', ' ')}, {scorer}": key
        for (scorer, direction), key in recalls.items()
        if scorer != BEST and direction in ("text_to_image", "text_to_audio")
    }
    return "\n\n".join(columns(results, keys) for keys in (head | best, alone))


def columns(results: dict[str, dict], keys: dict[str, str]) -> str:
    """A Markdown table of the figures under `keys`, by heading; those that no cell has are left out."""
    keys = {name: key for name, key in keys.items() if any(key in found for found in results.values())}
    lines = ["| " + " | ".join(["", *keys]) + " |", "|---" * (len(keys) + 1) + "|"]
    for cell, found in results.items():
        name = cell if cell == FULL else f"without {cell}"
        figures = []
        for key in keys.values():
            figure = f"{found[key]:.1f}" if found.get(key) is not None else ""
            if (error := found.get(f"{key}_standard_error")) is not None:
                figure += f" ± {error:.1f}"
            figures.append(figure)
        lines.append("| " + " | ".join([name, *figures]) + " |")
    return "\n".join(lines)
