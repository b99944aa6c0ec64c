"""Fine-tuning: a pre-trained model, trained on for one downstream task by the same loop, and what it gains.

PRETRAINED/{config.json, data, encoders, cache, checkpoints}, which `opt_jax.pipeline` made ->
workdir/data and workdir/cache, where the task has data of its own -> workdir/before (the pre-trained model,
where it can do the task), workdir/checkpoints/finetune, workdir/dvae (of tasks that draw),
workdir/evaluation -> workdir/results.json, workdir/report.html
"""

import contextlib
import hashlib
import json
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from opt_jax.cache.manifest import CacheError
from opt_jax.cache.reader import FeatureCache
from opt_jax.checkpoints import parameters_digest
from opt_jax.configuration import differences
from opt_jax.data import spoken_scenes
from opt_jax.data.loader import Loader
from opt_jax.data.noise import Noisy
from opt_jax.data.sources import open_splits
from opt_jax.data.spoken_scenes.questions import QUESTIONS_VERSION
from opt_jax.data.triplet import Source, SourceError
from opt_jax.data.vqa import behind
from opt_jax.evaluation.report import write_report
from opt_jax.evaluation.run import EVALUATION_VERSION
from opt_jax.pipeline import (
    SPLITS,
    cached_source,
    make_caches,
    make_loader,
    make_sources,
    own_rows,
    too_few,
    training_weights,
    without,
)
from opt_jax.stages import adding_seconds, noted_seconds, run_stage, write_record
from opt_jax.tasks import input_sets
from opt_jax.tasks.classification import Classification
from opt_jax.tasks.downstream import Downstream
from opt_jax.tasks.drawing import Drawing
from opt_jax.tasks.question_answering import QuestionAnswering
from opt_jax.tasks.retrieval import Retrieval
from opt_jax.tasks.writing import Writing
from opt_jax.train import train
from opt_jax.trained import Trained, load_trained

TASKS: dict[str, type[Downstream]] = {
    "captioning": Writing,
    "speech_recognition": Writing,
    "text_to_image": Drawing,
    "classification": Classification,
    "retrieval": Retrieval,
    "vqa": QuestionAnswering,
}
QUESTION_SEED = 1 << 20
PREDICTED = ("predicted_step_seconds", "predicted_minutes")  # told before the start, no part of what is made
SECONDS = Path("checkpoints") / "finetune_seconds.json"


def run(config, workdir) -> dict:
    """Fine-tunes and evaluates; returns the results. `config` is that of a file in configs/finetune.

    Raises WorkdirError for a `config.pretrained` that holds no trained model, and InputSetError for input
    sets that the task or the data do not have.
    """
    workdir = Path(workdir)
    trained = load_trained(config.pretrained, config.pretrained_step or None)
    print(f"{config.task}: from step {trained.step} of {config.pretrained}", flush=True)
    sources, caches = make_data(config, trained, workdir)
    loaders = {split: own_loader(config, trained, cache, whole=True) for split, cache in caches.items()}
    task = TASKS[config.task](config, trained, loaders, sources)
    identity = {
        "task": config.task,
        "inputs": list(config.inputs),
        "precision": config.precision,
        "parameters": parameters_digest(trained.model.params),
        "caches": {split: cache.manifest.digest for split, cache in caches.items()},
        # A source may lie elsewhere the next time: what it is the caches tell.
        "settings": {
            name: value for name, value in config.to_dict().items() if name in task_settings(config)
        }
        | {"data": without(config.data.to_dict(), "source")},
    }
    if short := too_few(len(caches["train"]), None, config.train.batch_size):
        raise CacheError(f"the train split has, of those that can be used, {short}")
    judged = identity | {"evaluation": judging(config), "version": EVALUATION_VERSION}
    before = run_stage("before", workdir / "before", judged, task.before, collective=False)
    checkpoints = workdir / "checkpoints" / "finetune"
    checkpoints.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0 and not any(path.name.isdigit() for path in checkpoints.iterdir()):
        # Nothing is trained yet, and neither the model nor the data refused this configuration. Once
        # something is, the one that made it stays until another has come to the end.
        write_record(workdir / "config.json", config.to_dict())
    done = (checkpoints / str(config.train.steps)).exists()
    with contextlib.nullcontext() if done else adding_seconds(workdir / SECONDS):
        params = train(
            task.task(),
            own_loader(config, trained, caches["train"], whole=False, source=sources["train"]),
            config.train,
            workdir,
            name="finetune",
            seed=config.seed,
            fingerprint=identity,
            initial_params=task.initial(),
        )
    task.build(workdir)
    if jax.process_count() > 1:
        params = multihost_utils.process_allgather(params, tiled=True)
    judged |= {"parameters": parameters_digest(params)}
    after = run_stage(
        "evaluation",
        workdir / "evaluation",
        judged,
        lambda path: task.evaluate(params, path),
        collective=False,
    )
    if jax.process_index():
        return after
    results = after | {f"before/{key}": value for key, value in before.items()}
    results["seconds/finetune"] = noted_seconds(workdir / SECONDS)
    for stage in ("before", "evaluation"):
        results[f"seconds/{stage}"] = json.loads((workdir / stage / "stage.json").read_text())["seconds"]
    results |= {f"triplets/{split}": own_rows(cache, sources[split]) for split, cache in caches.items()}
    results["pretrained"] = identity["parameters"]
    results["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(params))
    write_record(workdir / "results.json", results)
    write_record(workdir / "config.json", config.to_dict())
    print(table(before, after))
    print(f"report: {write_report(workdir)}", flush=True)
    return results


def make_data(config, trained: Trained, workdir: Path) -> tuple[dict[str, Source], dict[str, FeatureCache]]:
    """Sources and caches by split: those of the pre-training, or what `config.data` asks for instead, with
    the pre-training's encoders, in the workdir.

    Raises SourceError, InputSetError and CacheError.
    """
    if config.data.kind == "pretraining":
        sources = make_sources(trained.config, trained.directory)
        features = {split: trained.directory / "cache" / split / "features" for split in SPLITS}
        caches = {split: FeatureCache(path) for split, path in features.items()}
        for split, cache in caches.items():
            found = cached_source(trained.config, split, sources[split]).fingerprint()
            if changed := differences(cache.manifest.fingerprint["source"], found):
                raise CacheError(
                    f"the {split} split is not what {features[split]} was made of: {'; '.join(changed)};"
                    " run the pre-training's command again"
                )
        return sources, caches
    check_encoders(config, trained)
    if config.data.kind == "source":
        sources = open_splits(config.data.source)
        check_source(config, trained, sources)
        counts = ", ".join(f"{split} {len(source)}" for split, source in sources.items())
        classes = len(sources["train"].class_names)
        print(f"data: {config.data.source}: {counts} rows, {classes} classes", flush=True)
    elif config.data.kind == "noise":
        clean = make_sources(trained.config, trained.directory)
        seeds = {split: 1000 * config.data.seed + number for number, split in enumerate(SPLITS)}
        sources = {split: Noisy(clean[split], config.data.decibels, seeds[split]) for split in SPLITS}
    else:
        sources = make_questions(config, trained, workdir / "data")
    encoders = {name: path for name, path in trained.encoders.items() if path}
    return sources, make_caches(trained.config, workdir, sources, trained.tokenizer, encoders)


def shown(config) -> list[str]:
    """The modalities that occur in config.inputs."""
    used = input_sets.parse(config.inputs).any(0)
    return [name for name, is_used in zip(input_sets.NAMES, used, strict=True) if is_used]


def check_encoders(config, trained: Trained) -> None:
    """Raises InputSetError, before noise or questions are made, where the pre-training cannot take them."""
    if config.data.kind == "questions":
        needed, able = ("image", "audio"), trained.modalities  # each scene has both
        remedy = "name questions about pictures alone, with config.data.kind='source'"
    elif config.data.kind == "noise":
        needed, remedy = shown(config), "set config.inputs to others"
        able = (*trained.modalities, *(("image",) if trained.extraction.ready else ()))
    else:
        return
    if lacking := [name for name in needed if name not in able]:
        raise input_sets.InputSetError(
            f"{config.task} on {config.data.kind} needs {' and '.join(lacking)}, for which the pre-training"
            f" in {trained.directory} has no encoder; {remedy}, or name another pre-training"
        )


def check_source(config, trained: Trained, sources: dict[str, Source]) -> None:
    """Raises SourceError or InputSetError for what the task would stumble over once all is cached."""
    task, spec, named = TASKS[config.task], config.data.source, shown(config)
    encoders = {"image": trained.extraction.pictures, "audio": trained.extraction.speech}
    for split, source in sources.items():
        if not len(source):
            raise SourceError(
                f"the {split} split of {spec} has no rows; name a list for it, or hold more out (hold_out=N)"
            )
        there = {"image" if part == "regions" else part for part in source.modalities}
        if lacking := [name for name in (*named, *task.target) if name not in there]:
            letters = [name[0].upper() for name in lacking if name in named]
            change = f"set config.inputs to sets without {', '.join(letters)}, or " if letters else ""
            both = " and ".join(lacking)
            raise input_sets.InputSetError(
                f"{config.task} from config.inputs {tuple(config.inputs)} needs {both}, which the {split}"
                f" split of {spec} has not; {change}name a source with {both}"
            )
        unknown = [part for part, encoder in encoders.items() if part in source.modalities and not encoder]
        if unknown:
            raise input_sets.InputSetError(
                f"the {split} split of {spec} has {' and '.join(unknown)}, for which the pre-training in"
                f" {trained.directory} has no encoder; leave out the option that says where these files are"
            )
    if issubclass(task, Classification) and not sources["train"].class_names:
        raise input_sets.InputSetError(
            f"the train split of {spec} has no labels, which {config.task} needs; name a source with labels,"
            " such as one of kind open_images_labels or vqa"
        )
    if task is QuestionAnswering:
        behind(sources["train"])  # which refuses mixtures


def make_questions(config, trained: Trained, directory: Path) -> dict[str, Source]:
    """Spoken Scenes with questions, the pictures and voices as in the pre-training's."""
    settings = spoken_scenes.default_config()
    given = {name: value for name, value in config.data.items() if name in settings}
    pictures = {name: trained.config.data.spoken_scenes[name] for name in ("image_size", "max_objects")}
    settings.update(given | pictures)
    seed = QUESTION_SEED + config.data.seed  # other scenes than those of the pre-training
    inputs = {"settings": settings.to_dict(), "seed": seed, "asks": True}
    inputs["generator_version"] = spoken_scenes.GENERATOR_VERSION
    inputs["questions_version"] = QUESTIONS_VERSION

    def build(path):
        return spoken_scenes.generate(path, settings, seed, asks=True)

    def intact():
        return spoken_scenes.has_all_shards(directory)

    run_stage("data", directory, inputs, build, collective=False, intact=intact)
    return {split: spoken_scenes.SpokenScenes(directory, split) for split in SPLITS}


def own_loader(
    config, trained: Trained, cache: FeatureCache, *, whole: bool, source: Source | None = None
) -> Loader:
    """The pre-training's loader, with this run's batch size and seed; `source` tells a mixture's weights."""
    settings = trained.config.copy_and_resolve_references()
    weights = None if source is None else training_weights(settings, source)
    settings.train.batch_size, settings.seed = config.train.batch_size, config.seed
    if weights is not None:
        weights = weights[cache.source_row]
    return make_loader(settings, cache, trained.regions, weights=weights, whole=whole)


def task_settings(config) -> set[str]:
    """Names of the fields that only this task has, and of those that change what every task learns."""
    common = {"task", "inputs", "pretrained", "pretrained_step", "workdir", "seed", "precision"}
    return set(config) - common - {"distributed", "train", "evaluation", *PREDICTED}


def judging(config) -> dict:
    """What decides the figures of a model: a file by its content, and one that is not named not at all."""
    settings = config.evaluation.to_dict()
    if named := settings.pop("document_frequencies", ""):
        settings["document_frequencies"] = hashlib.sha256(Path(named).read_bytes()).hexdigest()
    return settings


def table(before: dict, after: dict) -> str:
    """The figures side by side, as lines of Markdown; texts are left out."""
    figures = {key: value for key, value in after.items() if isinstance(value, int | float)}
    width = max(map(len, figures), default=0)
    lines = [f"| {'':{width}} | pre-trained | fine-tuned |", "|---|---:|---:|"]
    for key, value in figures.items():
        old = f"{before[key]:.4g}" if key in before else ""
        lines.append(f"| {key:{width}} | {old:>11} | {value:>10.4g} |")
    return "\n".join(lines)
