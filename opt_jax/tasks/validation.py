"""Judges a configuration of fine-tuning, or of the ablation, before anything long starts."""

import math
from collections.abc import Iterator
from pathlib import Path

from ml_collections import ConfigDict

from opt_jax.checks import DECAYS, below_one, not_negative, one_of, positive, probability
from opt_jax.configuration import ConfigError, nearest
from opt_jax.evaluation.cider import read_frequencies

FULL = "full"  # the ablation's name for what leaves nothing out
TASKS = ("captioning", "classification", "retrieval", "speech_recognition", "text_to_image", "vqa")
OBJECTIVES = ("mlm", "mvfr", "mrc", "mafr", "macl", "dtr", "dir", "matching", "contrastive")
DATA = {"speech_recognition": ("pretraining", "source", "noise"), "vqa": ("questions", "source")}
OTHERS_DATA = ("pretraining", "source")
PRECISIONS = ("float32", "bfloat16", "float16")


def validate(config: ConfigDict) -> None:
    """Checks a configuration as the files in configs/finetune, or configs/ablation.py, make it.

    Raises ConfigError: one line for each problem.
    """
    check = _ablation if config.task == "ablation" else _finetuning
    if problems := [*_pretrained(config), *check(config), *not_negative(config, "predicted_step_seconds")]:
        raise ConfigError("\n".join(problems))


def _pretrained(config) -> Iterator[str]:
    if not (Path(config.pretrained) / "config.json").is_file():
        yield (
            f"config.pretrained: {config.pretrained!r} holds no pre-training; name its --workdir, or make one"
            " first: python -m opt_jax.main --config=configs/pretrain.py"
        )
    elif Path(config.pretrained).resolve() == Path(config.workdir).resolve():
        yield f"the workdir is that of the pre-training, {config.pretrained}; choose another"


def _ablation(config) -> Iterator[str]:
    yield from positive(config, "steps")
    yield from not_negative(config, "seed")
    yield from _evaluation(config)
    if not config.families:
        yield "config.families is empty; name at least one, with the objectives that it leaves out"
    for family, names in config.families.items():
        if family == FULL or "/" in family:
            yield f"config.families: {family!r} cannot be the name of a family; choose another"
        if not names:
            yield f"config.families.{family} is empty; name the objectives that it leaves out"
        for name in names:
            if name not in OBJECTIVES:
                yield f"config.families.{family}: no objective is called {name!r}{nearest(name, OBJECTIVES)}"


def _finetuning(config) -> Iterator[str]:
    yield from one_of(config, "task", TASKS)
    yield from one_of(config, "precision", PRECISIONS)
    yield from one_of(config, "data.kind", DATA.get(config.task, OTHERS_DATA))
    named, wanted = bool(config.data.source.strip()), config.data.kind == "source"
    if wanted and not named:
        yield (
            "config.data.source is empty, but config.data.kind is 'source'; name the data, such as"
            " karpathy:dataset_flickr30k.json,images=flickr30k"
        )
    if named and not wanted:
        yield (
            f"config.data.source is {config.data.source!r}, but config.data.kind is {config.data.kind!r}; set"
            " config.data.kind to 'source', or leave the source out"
        )
    counts = [field for field in ("train", "validation", "test") if field in config.data]
    yield from positive(config, *(f"data.{field}" for field in counts))
    yield from not_negative(config, "seed", "pretrained_step")
    yield from not_negative(config, *(("data.seed",) if "seed" in config.data else ()))
    yield from below_one(config, "dropout", "train.beta1", "train.beta2")
    yield from one_of(config, "train.decay", DECAYS)
    sizes = ("steps", "batch_size", "accumulation", "learning_rate", "epsilon", "log_every")
    sizes += ("checkpoint_every", "checkpoint_minutes", "keep", "max_nonfinite")
    yield from positive(config, *(f"train.{field}" for field in sizes))
    yield from not_negative(
        config, *(f"train.{field}" for field in ("warmup_steps", "weight_decay", "clip_norm"))
    )
    if config.train.warmup_steps >= config.train.steps:
        yield (
            f"config.train.warmup_steps is {config.train.warmup_steps}, of config.train.steps"
            f" {config.train.steps}: the rate would never reach config.train.learning_rate; lower it"
        )
    if "picture_decoder" in config:
        decoder = [f"picture_decoder.train.{field}" for field in config.picture_decoder.train]
        zero = ("steps", "warmup_steps", "weight_decay")
        yield from not_negative(config, *(field for field in decoder if field.endswith(zero)))
        yield from positive(config, *(f for f in decoder if f.endswith(("batch_size", "learning_rate"))))
        yield from one_of(config, "picture_decoder.train.decay", DECAYS)
    yield from probability(config, "train.end_learning_rate_fraction")
    shares = ("label_smoothing", "hard_fraction", "hidden_fraction", "margin")
    yield from probability(config, *(field for field in shares if field in config))
    weights = [field for field in ("contrastive_weight", "text_weight") if field in config]
    yield from not_negative(config, *weights)
    counts = ("hard_temperature", "anchors", "negatives", "picture_weight")
    yield from positive(config, *(field for field in counts if field in config))
    yield from _evaluation(config)
    yield from _inputs(config)
    if "decibels" in config.data and not math.isfinite(config.data.decibels):
        yield f"config.data.decibels is {config.data.decibels}; it must be finite"


def _inputs(config) -> Iterator[str]:
    names = [frozenset(name.split("+")) for name in config.inputs]
    for number, name in enumerate(names):
        if name in names[:number]:
            yield f"config.inputs names {config.inputs[number]!r} twice; leave one out"
        if config.task == "vqa" and not name & {"T", "A"}:
            yield (
                f"config.inputs {config.inputs[number]!r} shows no question, which is the text T or the"
                " speech A; add one of them"
            )


def _evaluation(config) -> Iterator[str]:
    may_be_zero = {"examples", "rerank_top", "guidance", "seed"}
    if named := config.evaluation.get("document_frequencies"):
        try:
            read_frequencies(named)
        except ValueError as error:
            yield f"config.evaluation.document_frequencies: {error}"
    numbers = set(config.evaluation) - {"document_frequencies"}
    fields = {field: f"evaluation.{field}" for field in sorted(numbers)}
    yield from not_negative(config, *(name for field, name in fields.items() if field in may_be_zero))
    yield from positive(config, *(name for field, name in fields.items() if field not in may_be_zero))
    if config.evaluation.get("pool_size", 2) == 1:
        yield "config.evaluation.pool_size is 1; of one there is nothing to choose"
