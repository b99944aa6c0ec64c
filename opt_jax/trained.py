"""A trained model as its working directory has it: everything that is needed to ask it things."""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from opt_jax.cache.extraction import Extraction
from opt_jax.cache.manifest import Manifest, read_manifest
from opt_jax.cache.reader import FeatureCache
from opt_jax.cache.schema import Quarantine, Schema, caption_key, make_example
from opt_jax.checkpoints import DamagedCheckpoint, restore_parameters
from opt_jax.convert.opt import smallest_batch
from opt_jax.convert.table import shapes_of
from opt_jax.data.loader import collate
from opt_jax.data.plan import Batch
from opt_jax.data.triplet import Triplet, UnusableSampleError
from opt_jax.encoders.frozen import FrozenEncoderError, digest, load_frozen
from opt_jax.encoders.tokenizer import Tokenizer, load_tokenizer
from opt_jax.encoders.validation import ENCODERS
from opt_jax.evaluation.scorers import Model
from opt_jax.models.opt import OPT
from opt_jax.pipeline import build_model, region_positions
from opt_jax.stages import DONE, read_record
from opt_jax.tasks.validation import TASKS

TRAIN_FEATURES = Path("cache") / "train" / "features"
# What a configuration needs where a model is asked; objects in JSON those of the first.
OF_PRETRAINING = ("cache", "data", "encoders", "evaluation", "loader", "model")
OF_TASK = ("data", "evaluation", "inputs", "precision", "pretrained", "pretrained_step")


class WorkdirError(ValueError):
    """A working directory holds no trained model, or not all that belongs to it; the message says what."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model with what turns files into its inputs, and its outputs into words and pictures.

    Attributes:
      model: to be asked. step: of training, that the parameters are of. config: of the run, in `directory`.
      encoders: directories of the frozen encoders by name, None for one that is not used.
      extraction: the frozen encoders. schema: of what these give. class_names: of the training data.
      regions: positions of a batch. dvae: parameters that decode image codes, or None.
    """

    model: Model
    step: int
    config: ConfigDict
    directory: Path
    encoders: Mapping[str, Path | None]
    tokenizer: Tokenizer
    extraction: Extraction
    schema: Schema
    class_names: tuple[str, ...]
    regions: int
    dvae: Any

    @property
    def modalities(self) -> tuple[str, ...]:
        """Of 'text', 'image' and 'audio' those that the encoders of this run can take."""
        # Ready regions were made elsewhere.
        pictures = bool(self.extraction.pictures) and not self.extraction.ready
        able = (True, pictures, bool(self.extraction.speech))
        return tuple(name for name, can in zip(("text", "image", "audio"), able, strict=True) if can)

    def batch(self, triplets: Sequence[Triplet]) -> dict[str, np.ndarray]:
        """The triplets as one batch of the loader. Raises UnusableSampleError, naming one and why."""
        for triplet in triplets:
            given = {"text": triplet.caption, "image": triplet.image, "audio": triplet.audio}
            for name, value in given.items():
                if value is not None and name not in self.modalities:
                    reason = "is there, which this model was trained without"
                    raise UnusableSampleError(triplet.id, name, reason)
        rows = []
        for row, (triplet, arrays) in enumerate(
            zip(triplets, self.extraction.extract(triplets), strict=True)
        ):
            made = arrays
            if not isinstance(arrays, Quarantine):
                made = make_example(triplet, arrays, row, self.schema)
            if isinstance(made, Quarantine):
                raise UnusableSampleError(triplet.id, "row", f"cannot be used: {made.reason}")
            rows.append(made)
        buckets = self.config.loader
        lengths = buckets.text_lengths[-1], buckets.audio_lengths[-1]
        examples = Examples(rows, self.schema, self.class_names)
        batch = Batch(np.arange(len(rows)), *lengths)
        return collate(examples, batch, self.config.cache.audio_stack, self.regions)


class Examples:
    """Rows in memory, for `collate` as those of a cache."""

    def __init__(self, rows: Sequence[dict], schema: Schema, class_names: Sequence[str]):
        self._rows, self.schema, self.class_names = rows, schema, class_names
        self.caption_keys = [caption_key(row["caption"], row["id"]) for row in rows]

    def __getitem__(self, row: int) -> dict:
        return self._rows[row]


@dataclasses.dataclass(frozen=True)
class FineTuned:
    """What a fine-tuning made of a pre-trained model, for one task. C classes, D width of the model.

    Attributes:
      trained: the pre-trained model, whose encoders, tokenizer and statistics the fine-tuned one shares.
      model: the fine-tuned one, to be asked. step: of the fine-tuning, that its parameters are of.
      config: of the fine-tuning.
      classes: {"kernel": [4 D, C], "bias": [C]}, which choose a label or an answer; None for other tasks.
      class_names: of the data that it was fine-tuned on: the labels, or the answers.
    """

    trained: Trained
    model: Model
    step: int
    config: ConfigDict
    classes: Mapping[str, jax.Array] | None
    class_names: tuple[str, ...]


def read_config(workdir) -> ConfigDict:
    """The configuration as run; one with a `task` is that of a fine-tuning. Raises WorkdirError."""
    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise WorkdirError(f"{workdir} holds no {path.name}; name the --workdir of a training")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise WorkdirError(f"{path} is damaged ({error}); run the training's command again") from error
    content = content if isinstance(content, dict) else {}
    wanted = OF_PRETRAINING if "task" not in content else OF_TASK if content["task"] in tuple(TASKS) else ()
    objects = {name for name, value in content.items() if isinstance(value, dict)}
    if lacking := [name for name in wanted if name not in (objects if name in OF_PRETRAINING else content)]:
        told = f"{path} is not that of a training: it has no {', '.join(lacking)}"
        raise WorkdirError(f"{told}; name the --workdir of one")
    return ConfigDict(content)


def load_trained(workdir, step: int | None = None) -> Trained:
    """What `python -m opt_jax.main` made in `workdir`, with the parameters of a step, by default the last.

    Raises WorkdirError; CacheError, FrozenEncoderError or DamagedCheckpoint for what is there but damaged.
    """
    workdir = Path(workdir)
    config = read_config(workdir)
    if "encoders" not in config:
        raise WorkdirError(f"{workdir} is that of a {config.get('task')}, not of a pre-training")
    cache = FeatureCache(workdir / TRAIN_FEATURES)
    used = cache.manifest.fingerprint["extractor"]
    encoders = {name: _encoder(config, workdir, name, used[name]) for name in ENCODERS}
    words = config.encoders.tokenizer
    tokenizer = load_tokenizer(
        words.name if words.kind == "pretrained" else workdir / "encoders" / "tokenizer"
    )
    ready = tuple(used["detector"]) if isinstance(used["detector"], list) else None
    window = used.get("grid_window", 1)
    options = (tokenizer, used["max_seconds"], cache.schema.feature_dtype, ready, window)
    extraction = Extraction(*encoders.values(), *options)
    dvae, dvae_config = load_frozen(encoders["dvae"]) if encoders["dvae"] else (None, {"vocab_size": 1})
    model, statistics = build_model(config, cache, tokenizer, dvae_config["vocab_size"])
    try:
        best = workdir / "checkpoints" / "pretrain_best"  # which early stopping keeps
        kept = best if step is None and best.is_dir() else best.with_name("pretrain")
        step, params = restore_parameters(kept, step)
    except FileNotFoundError as error:
        raise WorkdirError(str(error)) from error
    _check_shapes(model, params, kept / str(step))
    return Trained(
        model=Model(model, params, statistics),
        step=step,
        config=config,
        directory=workdir,
        encoders=encoders,
        tokenizer=tokenizer,
        extraction=extraction,
        schema=cache.schema,
        class_names=cache.manifest.class_names,
        regions=region_positions(config, {"train": cache}),
        dvae=dvae,
    )


def _check_shapes(model: OPT, params, checkpoint: Path) -> None:
    """Raises WorkdirError, naming the first parameter that has not the shape of the model's."""
    init = functools.partial(model.init, jax.random.key(0), *smallest_batch(model.sizes))
    found, expected = shapes_of(params), shapes_of(jax.eval_shape(init)["params"])
    for path in sorted(found.keys() | expected.keys()):
        has, wanted = (shapes.get(path, "absent") for shapes in (found, expected))
        if has != wanted:
            raise WorkdirError(
                f"{checkpoint}: {path} is {has}, but {wanted} in the model of this working directory's"
                " config.json and cache; put back what belongs together"
            )


def load_finetuned(workdir, step: int | None = None, pretrained=None) -> FineTuned:
    """What `opt_jax.finetuning` made in `workdir`, with the parameters of a step, by default the last.

    pretrained: directory of the pre-training, by default where it was when the fine-tuning began.

    Raises WorkdirError for a pre-training that is not there, or is another; and what `load_trained` raises.
    """
    workdir = Path(workdir)
    config = read_config(workdir)
    if config.get("task") not in TASKS:
        raise WorkdirError(f"{workdir} is not that of a fine-tuning; name one's --workdir")
    place = Path(pretrained or config.pretrained)
    if not (place / "config.json").is_file():
        raise WorkdirError(
            f"{workdir} was fine-tuned from a pre-training, which is not in {place.absolute()}; tell where"
            " it is now with --pretrained=DIR"
        )
    try:
        found, params = restore_parameters(workdir / "checkpoints" / "finetune", step)
    except FileNotFoundError as error:
        none = f"{workdir} holds no checkpoint of its {config.task} yet; run its command again, to the end"
        raise WorkdirError(none if step is None else str(error)) from error
    except DamagedCheckpoint as error:
        raise DamagedCheckpoint(f"{error}; delete it, and run the fine-tuning's command again") from error
    data = _features(config, workdir, place)
    trained = load_trained(place, config.pretrained_step or None)
    if (own := workdir / "dvae").is_dir():  # with a decoder that had more training
        encoders = {**trained.encoders, "dvae": own}
        trained = dataclasses.replace(trained, dvae=load_frozen(own)[0], encoders=encoders)
    opt, classes = (params["opt"], params["classes"]) if "classes" in params else (params, None)
    if jax.tree.map(np.shape, opt) != jax.tree.map(np.shape, trained.model.params):
        raise _another(workdir, place)
    network = OPT(trained.config.model.to_dict() | {"dtype": config.precision}, trained.model.model.sizes)
    model = Model(network, opt, trained.model.statistics)
    return FineTuned(trained, model, found, config, classes, data.class_names)


def _features(config: ConfigDict, workdir: Path, pretrained: Path) -> Manifest:
    """Of the features that a fine-tuning was trained on: its own, or those of the pre-training.

    Raises WorkdirError where they are not what this pre-training's encoders make.
    """
    theirs = read_manifest(pretrained / TRAIN_FEATURES)
    if config.data.kind == "pretraining":
        used = read_record(workdir / "before" / DONE)
        if used is not None and used["inputs"]["caches"]["train"] != theirs.digest:
            raise _another(workdir, pretrained)
        return theirs
    own = read_manifest(workdir / TRAIN_FEATURES)
    if own.fingerprint["extractor"] != theirs.fingerprint["extractor"]:
        raise _another(workdir, pretrained)
    return own


def _another(workdir: Path, pretrained: Path) -> WorkdirError:
    told = f"{workdir} was fine-tuned from another pre-training than the one in {pretrained}"
    return WorkdirError(f"{told}; tell where that is with --pretrained=DIR")


def _encoder(config: ConfigDict, workdir: Path, name: str, wanted) -> Path | None:
    """Directory of the encoder with the hash that the cache was made with; None where it needed none."""
    if not isinstance(wanted, str) or wanted in ("grid", "none"):
        return None
    path = Path(config.encoders[name].pretrained or workdir / "encoders" / name)
    if digest(path) != wanted:
        raise FrozenEncoderError(f"{path} is another {name} than the one that {workdir}/cache was made with")
    return path
