"""The stages of a pre-training run, from raw triplets to the report; each is skipped where its output is
there already.

workdir/data -> workdir/encoders/{tokenizer,detector,wav2vec2,dvae} -> workdir/cache/{train,validation,test}
-> workdir/checkpoints/pretrain, workdir/metrics.jsonl, workdir/tensorboard
-> workdir/evaluation, workdir/results.json, workdir/report.html
"""

import contextlib
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from opt_jax.cache.builder import build_cache, intact
from opt_jax.cache.extraction import Extraction
from opt_jax.cache.manifest import QUARANTINE, CacheError
from opt_jax.cache.reader import FeatureCache
from opt_jax.checkpoints import parameters_digest
from opt_jax.convert.uniter import for_standardised_regions
from opt_jax.data import spoken_scenes
from opt_jax.data.augmentation import Augmented, with_copies
from opt_jax.data.loader import Loader, LoaderConfig
from opt_jax.data.mixture import row_weights
from opt_jax.data.sources import open_splits
from opt_jax.data.splits import check_splits, too_few
from opt_jax.data.triplet import Source
from opt_jax.encoders.dvae_training import train_dvae
from opt_jax.encoders.faster_rcnn_training import train_detector
from opt_jax.encoders.frozen import digest, load_frozen
from opt_jax.encoders.tokenizer import load_tokenizer, train_tokenizer
from opt_jax.encoders.validation import ENCODERS
from opt_jax.encoders.wav2vec2 import frame_count
from opt_jax.encoders.wav2vec2_batches import SAMPLE_RATE
from opt_jax.encoders.wav2vec2_training import train_wav2vec2
from opt_jax.evaluation.report import write_report
from opt_jax.evaluation.run import EVALUATION_VERSION, available_modalities, evaluate
from opt_jax.evaluation.scorers import Model
from opt_jax.models.inputs import Statistics
from opt_jax.models.opt import OPT, Sizes
from opt_jax.pretraining import corruption_settings, pretraining_task
from opt_jax.stages import adding_seconds, noted_seconds, run_stage, write_record
from opt_jax.train import train

SPLITS = ("train", "validation", "test")
SECONDS = Path("checkpoints") / "pretrain_seconds.json"


def run(config, workdir) -> dict:
    """Runs every stage and returns the results; `config` is that of configs/pretrain.py."""
    workdir = Path(workdir)
    sources = make_sources(config, workdir)
    tokenizer = make_tokenizer(config, workdir, sources)
    encoders = make_encoders(config, workdir, sources)
    caches = make_caches(config, workdir, sources, tokenizer, encoders)
    available_modalities(caches["test"])  # refuses, before the long training, what cannot be evaluated
    weights = training_weights(config, sources["train"])
    params, model, statistics = pretrain(config, workdir, caches, tokenizer, encoders, weights)
    return make_report(config, workdir, sources, caches, tokenizer, encoders, (model, params, statistics))


def make_sources(config, workdir: Path) -> dict:
    """The raw triplets by split; Spoken Scenes are generated, others are opened where they are."""
    if config.data.source == "manifest":
        sources = open_splits(config.data.manifest)
        check_splits(sources, config.train.batch_size, bool(config.train.validate_every))
        counts = ", ".join(f"{split} {len(source)}" for split, source in sources.items())
        classes = len(sources["train"].class_names)
        print(f"data: {config.data.manifest}: {counts} rows, {classes} classes", flush=True)
        return sources
    settings = spoken_scenes.default_config()
    settings.update(config.data.spoken_scenes)
    directory = workdir / "data"
    inputs = {"source": config.data.source, "settings": settings.to_dict(), "seed": config.seed}
    inputs["generator_version"] = spoken_scenes.GENERATOR_VERSION
    run_stage(
        "data",
        directory,
        inputs,
        lambda path: spoken_scenes.generate(path, settings, config.seed),
        collective=False,
        intact=lambda: spoken_scenes.has_all_shards(directory),
    )
    return {split: spoken_scenes.SpokenScenes(directory, split) for split in SPLITS}


def make_tokenizer(config, workdir: Path, sources: dict):
    """The vocabulary: trained on the training captions, or a published one by name."""
    settings = config.encoders.tokenizer
    if settings.kind == "pretrained":
        return load_tokenizer(settings.name)
    source, directory = sources["train"], workdir / "encoders" / "tokenizer"

    def build(path):
        captions = (source.caption(i) for i in range(len(source)))
        train_tokenizer((caption for caption in captions if caption), settings.vocab_size, path)

    inputs = {"data": source.fingerprint(), "vocab_size": settings.vocab_size}
    run_stage("encoders/tokenizer", directory, inputs, build, collective=False)
    return load_tokenizer(directory)


def make_encoders(config, workdir: Path, sources: dict) -> dict[str, Path]:
    """Directories of the frozen encoders: trained here, or those that the configuration names."""
    recipes = {"detector": train_detector, "wav2vec2": train_wav2vec2, "dvae": train_dvae}
    data = {split: sources[split].fingerprint() for split in ("train", "validation")}
    directories = {}
    for name in encoder_names(config, sources["train"].modalities):
        settings = config.encoders[name]
        if settings.pretrained:
            directories[name] = Path(settings.pretrained)
            continue
        recipe = settings.copy_and_resolve_references()
        with recipe.unlocked():
            del recipe.pretrained
        directories[name] = workdir / "encoders" / name

        def build(path, name=name, recipe=recipe):
            return recipes[name](recipe, sources["train"], sources["validation"], path, config.seed)

        inputs = {"data": data, "recipe": recipe.to_dict(), "seed": config.seed}
        run_stage(f"encoders/{name}", directories[name], inputs, build)
    return directories


def encoder_names(config, modalities) -> list[str]:
    """The encoders that a run uses: a grid needs no detector, data without speech no wav2vec 2.0, and data
    without pixels no dVAE."""
    needed = {
        "detector": config.encoders.regions == "detector",
        "wav2vec2": "audio" in modalities or config.encoders.wav2vec2.pretrained,
        "dvae": "image" in modalities or config.encoders.dvae.pretrained,
    }
    return [name for name in ENCODERS if needed[name]]


def make_caches(
    config, workdir: Path, sources: dict, tokenizer, encoders: dict[str, Path]
) -> dict[str, FeatureCache]:
    """The features of every split, opened with the fingerprint that this configuration asks for."""
    # wav2vec 2.0 makes 50 frames a second.
    max_seconds = config.cache.max_audio_positions * config.cache.audio_stack / 50
    max_frames = 1
    if "wav2vec2" in encoders:
        speech = ConfigDict(load_frozen(encoders["wav2vec2"])[1])
        max_frames = int(frame_count(int(max_seconds * SAMPLE_RATE), speech))
    paths = [encoders.get(name) for name in ENCODERS]
    ready = (config.encoders.ready.size, config.encoders.ready.classes)
    ready = ready if config.encoders.regions == "ready" else None
    window = config.encoders.grid.window
    extraction = Extraction(*paths, tokenizer, max_seconds, config.cache.dtype, ready, window)
    caches = {}
    for split in SPLITS:
        directory = workdir / "cache" / split
        source = sources[split]
        source = cached_source(config, split, source)
        fingerprint = extraction.fingerprint(source)

        def build(path, split=split, source=source, fingerprint=fingerprint):
            manifest = build_cache(
                source,
                extraction,
                path / "features",
                fingerprint,
                split=split,
                schema=extraction.schema(),
                examples_per_shard=config.cache.examples_per_shard,
                processes=config.cache.processes,
            )
            return {"rows": manifest.num_rows, "quarantined": manifest.num_quarantined}

        inputs = {"fingerprint": fingerprint, "examples_per_shard": config.cache.examples_per_shard}
        whole = functools.partial(intact, directory / "features")
        run_stage(f"cache/{split}", directory, inputs, build, collective=False, intact=whole)
        caches[split] = cache = FeatureCache(directory / "features", fingerprint)
        if set_aside := len(sources[split]) - own_rows(cache, sources[split]):
            print(
                f"cache/{split}: {set_aside} of {len(sources[split])} rows could not be used; why is in"
                f" {directory / 'features' / QUARANTINE}",
                flush=True,
            )
        if at_limit := int((cache.frame_counts >= max_frames).sum()):
            print(
                f"cache/{split}: {at_limit} of {len(cache)} recordings reach the {max_seconds:g} s of"
                " config.cache.max_audio_positions; what is beyond is cut",
                flush=True,
            )
    return caches


def cached_source(config, split: str, source: Source) -> Source:
    """What the cache of a split is made of: in training with copies."""
    return with_copies(source, config.data.copies, config.seed) if split == "train" else source


def training_weights(config, source: Source) -> np.ndarray | None:
    """Visits in an epoch, on average, of each row of `cached_source`, float32; None where each has one."""
    weights = row_weights(source)
    copied = cached_source(config, "train", source)
    return weights[copied.rows] if weights is not None and isinstance(copied, Augmented) else weights


def own_rows(cache: FeatureCache, source: Source) -> int:
    """How many rows of a source its cache has, copies not counted."""
    return int((cache.source_row < len(source)).sum())


def make_loader(
    config, cache: FeatureCache, max_regions: int, *, weights=None, whole: bool = False
) -> Loader:
    """The loader of one split: this process's rows of each batch, or the whole batches."""
    settings = LoaderConfig(
        batch_size=config.train.batch_size,
        buckets=tuple(zip(config.loader.text_lengths, config.loader.audio_lengths, strict=True)),
        audio_stack=config.cache.audio_stack,
        max_regions=max_regions,
        seed=config.seed,
        workers=config.loader.workers,
    )
    index, count = (0, 1) if whole else (jax.process_index(), jax.process_count())
    return Loader(cache, settings, weights=weights, process_index=index, process_count=count)


def region_positions(config, caches: Mapping[str, FeatureCache]) -> int:
    """Regions in a batch: config.cache.max_regions, or fewer where no training picture has as many."""
    most = int(caches["train"].region_counts.max(initial=0))
    return max(min(config.cache.max_regions, most), config.objectives.placeholder_lengths.image)


def build_model(config, cache: FeatureCache, tokenizer, num_codes: int) -> tuple[OPT, Statistics]:
    """The model at the sizes of the data, and the statistics that standardise its features."""
    stack = config.cache.audio_stack
    sizes = Sizes(
        vocab_size=tokenizer.vocab_size,
        region_size=cache.schema.region_size,
        audio_size=cache.schema.audio_size * stack,
        num_region_classes=cache.schema.region_classes - 1,
        num_codes=num_codes,
        codes_per_image=cache.schema.num_codes,
    )
    statistics = Statistics(
        region_mean=cache.region_mean,
        region_deviation=np.maximum(cache.region_deviation, 1e-3),
        audio_mean=np.tile(cache.audio_mean, stack),
        audio_deviation=np.tile(np.maximum(cache.audio_deviation, 1e-3), stack),
    )
    return OPT(config.model.to_dict(), sizes), statistics


def pretrain(
    config, workdir: Path, caches: dict[str, FeatureCache], tokenizer, encoders: dict[str, Path], weights=None
):
    """Pre-trains OPT on the cache; returns (params, model, statistics).

    weights: float32 [rows of the training source], visits of each in an epoch, on average; None: one each.
    """
    codes = load_frozen(encoders["dvae"])[1]["vocab_size"] if "dvae" in encoders else 1
    model, statistics = build_model(config, caches["train"], tokenizer, codes)
    task = pretraining_task(model, statistics, corruption_settings(config, tokenizer), config.objectives)
    regions = region_positions(config, caches)
    if weights is not None:
        weights = weights[caches["train"].source_row]
    loader = make_loader(config, caches["train"], regions, weights=weights)
    if short := too_few(len(caches["train"]), weights, config.train.batch_size):
        raise CacheError(f"the train split has, of those that can be used, {short}")
    print(
        "pre-training batches:",
        ", ".join(f"{name} {value:.4g}" for name, value in loader.report().items()),
        flush=True,
    )
    inputs = {
        "cache": caches["train"].manifest.digest,
        "tokenizer": tokenizer.digest(),
        # What changes speed or memory only may change between two parts of a run.
        "model": without(config.model.to_dict(), "remat", "unroll"),
        "objectives": config.objectives.to_dict(),
        "loader": without(config.loader.to_dict(), "workers"),
        "audio_stack": config.cache.audio_stack,
        "max_regions": regions,
    }
    if weights is not None:
        inputs["weights"] = hashlib.sha256(weights.tobytes()).hexdigest()
    initial = None
    if config.initial_parameters:
        initial, made = load_frozen(config.initial_parameters)
        if not made.get("standardised"):  # as this project's own are
            initial = for_standardised_regions(initial, statistics.region_mean, statistics.region_deviation)
        inputs["initial_parameters"] = digest(config.initial_parameters)
    validation = None
    if config.train.validate_every:
        held_out = make_loader(config, caches["validation"], regions)
        size = config.train.batch_size
        rows = range(len(held_out.cache) // size * size)
        if not rows:
            raise CacheError(
                f"{len(held_out.cache)} usable validation triplets do not fill a batch of {size}; set"
                " config.train.validate_every to 0, or give more"
            )
        if len(rows) < len(held_out.cache):
            print(f"validation: {len(rows)} rows of {len(held_out.cache)}, which fill batches", flush=True)
        validation = list(held_out.evaluation_batches(rows, size, held_out.config.buckets[-1]))
    checkpoints = workdir / "checkpoints" / "pretrain"
    checkpoints.mkdir(parents=True, exist_ok=True)
    done = (checkpoints / str(config.train.steps)).exists()
    with contextlib.nullcontext() if done else adding_seconds(workdir / SECONDS):
        params = train(
            task,
            loader,
            config.train,
            workdir,
            name="pretrain",
            seed=config.seed,
            fingerprint=inputs,
            initial_params=initial,
            validation=validation,
        )
    return params, model, statistics


def make_report(config, workdir: Path, sources, caches, tokenizer, encoders, trained) -> dict:
    """Evaluates, and writes results.json and report.html."""
    model, params, statistics = trained
    if jax.process_count() > 1:
        # One process evaluates, so it needs every shard of the parameters.
        params = multihost_utils.process_allgather(params, tiled=True)
    regions = region_positions(config, caches)
    loaders = {split: make_loader(config, cache, regions, whole=True) for split, cache in caches.items()}

    def build(path):
        scorers = Model(model, params, statistics)
        return evaluate(config.evaluation, path, sources, loaders, tokenizer, encoders, scorers)

    inputs = {
        "evaluation": config.evaluation.to_dict(),
        "version": EVALUATION_VERSION,
        "caches": {split: cache.manifest.digest for split, cache in caches.items()},
        "parameters": parameters_digest(params),
        "max_regions": regions,
    }
    results = run_stage("evaluation", workdir / "evaluation", inputs, build, collective=False)
    if jax.process_index():
        return results
    # Lost where the training was killed outright.
    results["seconds/pretrain"] = noted_seconds(workdir / SECONDS)
    encoder_stages = [f"encoders/{name}" for name in ("tokenizer", *encoders)]
    for stage in ("data", *encoder_stages, *(f"cache/{split}" for split in SPLITS), "evaluation"):
        path = workdir / stage / "stage.json"
        if path.exists():
            results[f"seconds/{stage}"] = json.loads(path.read_text())["seconds"]
    for name in encoders:
        path = encoders[name] / "metrics.json"  # an encoder made elsewhere may have none
        metrics = json.loads(path.read_text()) if path.exists() else {}
        results |= {
            f"encoders/{name}/{key}": value
            for key, value in metrics.items()
            if isinstance(value, int | float)
        }
    for split, cache in caches.items():
        results[f"triplets/{split}"] = own = own_rows(cache, sources[split])
        results[f"set_aside/{split}"] = len(sources[split]) - own
    results["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(params))
    write_record(workdir / "results.json", results)
    # Again, now that no stage has refused it: the configuration that made what is there.
    write_record(workdir / "config.json", config.to_dict())
    print(f"report: {write_report(workdir)}", flush=True)
    return results


def without(mapping: dict, *names: str) -> dict:
    """The mapping less some keys."""
    return {key: value for key, value in mapping.items() if key not in names}
