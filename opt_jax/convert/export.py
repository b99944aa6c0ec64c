"""A trained model as a folder for PyTorch: weights, config.json, the frozen encoders, tokenizer and settings
that turn files into its inputs, a model card, and the files that define all of it there.

The folder is made beside the one that was named, and renamed when it is complete.
"""

import dataclasses
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from opt_jax.checkpoints import DamagedCheckpoint, parameters_digest
from opt_jax.convert import opt, opt_config
from opt_jax.convert.card import model_card
from opt_jax.convert.frozen import frozen
from opt_jax.convert.layout import numbers, planned
from opt_jax.convert.place import beside, check_place, straight, write_checksums
from opt_jax.convert.preparation import Preparation, preparation
from opt_jax.convert.shards import ExportError, Planned, total_size, write_weights
from opt_jax.encoders.tokenizer import Tokenizer
from opt_jax.export import MODELING_FILES, PROCESSING_FILES
from opt_jax.models.inputs import Statistics
from opt_jax.models.opt import OPT
from opt_jax.partitioning import path_name
from opt_jax.stages import DONE, read_record
from opt_jax.trained import WorkdirError, load_finetuned, load_trained, read_config

LIMIT = 5 * 10**9  # bytes of one file of weights, as is usual on the hub
SPARE = 10**7  # bytes for whatever is not weights
PARTS = ("all", "encoder")
CLASSES = {
    "AutoConfig": "configuration_opt_jax.OptJaxConfig",
    "AutoModel": "modeling_opt_jax.OptJaxModel",
}


@dataclasses.dataclass(frozen=True)
class Exported:
    """What an exported folder is made of.

    Attributes:
      network, params: the model and its tree of parameters. statistics: of its features.
      tokenizer: whose special tokens the text decoder writes.
      classes: {"kernel": [4 D, C], "bias": [C]} of a fine-tuned classifier, or None. class_names: C names.
      preparation: of its inputs; None: the folder holds the network alone.
      evaluated: whether the training's results.json is about these parameters.
    """

    network: OPT
    params: Any
    statistics: Statistics
    tokenizer: Tokenizer
    classes: Any = None
    class_names: tuple[str, ...] = ()
    preparation: Preparation | None = None
    evaluated: bool = True


def export(
    checkpoint, out: Path, *, pretrained=None, dtype: str = "float32", only: str = "all", force=False
) -> None:
    """Writes the folder `out`.

    The checkpoint is loaded whole, and its tensors are converted and written one at a time: it takes the
    memory of the parameters and a little more.

    Args:
      checkpoint: the working directory of a pre-training or a fine-tuning, or a step in its checkpoints.
      pretrained: of a fine-tuning: where its pre-training is now, if no longer where it was.
      dtype: of the weights, one of `shards.DTYPES`. only: one of `PARTS`; 'encoder' leaves the two decoders
        out. force: replace an exported folder.

    Raises: ExportError; and, for a checkpoint that is unfinished, damaged or foreign, what `load_trained` and
      `load_finetuned` raise. In all cases what was in `out` stays as it was.
    """
    check_place(out := straight(out), force)
    write_folder(load(checkpoint, pretrained), out, dtype=dtype, only=only, force=force)


def load(checkpoint, pretrained=None) -> Exported:
    """What there is to export in a working directory, or of a step in its checkpoints."""
    workdir, kind, step = found_in(Path(checkpoint))
    config = read_config(workdir)
    kinds = ("finetune",) if "task" in config else ("pretrain", "pretrain_best")
    if kind not in (None, *kinds):
        raise WorkdirError(f"{checkpoint} is of no {kinds[0]}; name a step in checkpoints/{kinds[0]}")
    if "task" in config:
        tuned = load_finetuned(workdir, step, pretrained)
        names = tuned.class_names if tuned.classes is not None else ()
        model, trained, step, rest = tuned.model, tuned.trained, tuned.step, (tuned.classes, names)
    else:
        if pretrained:
            raise WorkdirError(f"--pretrained is for a fine-tuning; {workdir} is a pre-training's")
        trained = load_trained(workdir, None if kind == "pretrain_best" else step)
        if step not in (None, trained.step):
            raise WorkdirError(f"{checkpoint} is no more; there is step {trained.step} now")
        model, step, rest = trained.model, trained.step, (None, ())
    prepared = preparation(trained, workdir, config, step, rest[1])
    rest += (prepared, was_evaluated(workdir, model.params, rest[0]))
    return Exported(model.model, model.params, model.statistics, trained.tokenizer, *rest)


def was_evaluated(workdir: Path, params, classes) -> bool:
    """Whether a training's results are about these parameters, which its evaluation has noted.

    Without that note there are no results, or none that say more.
    """
    record = read_record(workdir / "evaluation" / DONE)
    whole = params if classes is None else {"opt": params, "classes": classes}
    return record is None or record["inputs"].get("parameters") == parameters_digest(whole)


def found_in(place: Path) -> tuple[Path, str | None, int | None]:
    """(working directory, directory of checkpoints, step) that a path names; the latter None where it does
    not.

    Raises: WorkdirError: it is in the checkpoints of a training, but is no finished step.
    """
    # As it is written first: the checkpoints of a working directory may lie elsewhere, behind a link.
    paths = (Path(os.path.normpath(place.absolute())), place.resolve())
    for path in paths:
        if (path / "config.json").is_file():
            return path, None, None
        if path.parent.parent.name == "checkpoints" and path.name.isdigit() and path.is_dir():
            return path.parents[2], path.parent.name, int(path.name)
    for path in paths:
        if path.parent.parent.name == "checkpoints":
            raise WorkdirError(f"{place} is no finished checkpoint; name the --workdir, or another step")
        if "checkpoints" in (path.name, path.parent.name) and path.is_dir():
            steps = path.glob("[0-9]*" if path.parent.name == "checkpoints" else "*/[0-9]*")
            told = ", ".join(sorted(str(step.relative_to(path)) for step in steps if step.name.isdigit()))
            raise WorkdirError(f"{place} is no single checkpoint; name the --workdir or a step in it: {told}")
    return place.absolute(), None, None


def write_folder(
    exported: Exported,
    out: Path,
    *,
    dtype: str = "float32",
    only: str = "all",
    force: bool = False,
    limit: int = LIMIT,
) -> None:
    """Writes the folder; arguments as of `export`. limit: bytes of one file of weights."""
    check_place(out, force)
    config = configuration(exported, dtype, only)
    tensors, values = weights(exported, config, dtype)
    prepared = exported.preparation and held(exported.preparation, only)
    encoders = {name: frozen(name, place) for name, place in prepared.encoders.items()} if prepared else {}
    told = (out.absolute().name, only, exported.evaluated)
    card = model_card(prepared, config, *told) if prepared else ""
    size = total_size(tensors) + sum(total_size(encoder.tensors) for encoder in encoders.values())
    there = next(path for path in out.absolute().parents if path.exists())
    free, needed = shutil.disk_usage(there).free, size + SPARE
    if free < needed:
        told = f"{there} has {free / 1e9:.2f} GB free, the export takes {needed / 1e9:.2f} GB"
        smaller = ", or ask for --dtype=bfloat16" if dtype in ("float32", "float64") else ""
        raise ExportError(f"{told}; make room, or name another --out{smaller}")
    with beside(out) as aside:
        write_weights(aside, tensors, values, limit)
        (aside / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        files = MODELING_FILES
        for name, encoder in encoders.items():
            encoder.write(aside / name, limit)
        if prepared:
            files += PROCESSING_FILES
            prepared.write(aside, exported.tokenizer)
            (aside / "README.md").write_text(card, encoding="utf-8")
        for name in files:
            shutil.copyfile(Path(__file__).parents[1] / "export" / name, aside / name)
        write_checksums(aside)


def held(prepared: Preparation, only: str) -> Preparation:
    """With the frozen encoders that the folder is to hold: without the decoders no discrete VAE, where it
    would but turn codes into pictures."""
    unused = {"dvae"} if only == "encoder" and prepared.settings["regions"] != "grid" else set()
    places = {name: place for name, place in prepared.encoders.items() if place and name not in unused}
    return dataclasses.replace(prepared, encoders=places)


def configuration(exported: Exported, dtype: str, only: str) -> dict:
    """config.json, as `OptJaxConfig` reads it."""
    model, sizes, tokenizer = exported.network.config, exported.network.sizes, exported.tokenizer
    fields = (*opt_config.MODEL_FIELDS, "dropout", "initializer_range", "temperature_min")
    names = list(exported.class_names)
    config = {"model_type": opt_config.MODEL_TYPE, "architectures": ["OptJaxModel"], "auto_map": CLASSES}
    config |= {"dtype": dtype} | dataclasses.asdict(sizes) | {name: model[name] for name in fields}
    config |= {name: dict(model[name]) if only == "all" else None for name in opt_config.DECODERS}
    config |= {f"{name}_token_id": getattr(tokenizer, f"{name}_id") for name in ("pad", "cls", "sep", "mask")}
    config["num_classes"] = 0 if exported.classes is None else len(exported.classes["bias"])
    if names:
        config["id2label"] = dict(enumerate(names))
        config["label2id"] = {name: number for number, name in enumerate(names)}
    return config


def weights(exported: Exported, config: Mapping, dtype: str) -> tuple[list[Planned], Iterator[np.ndarray]]:
    """The tensors to write and, one at a time, their numbers, of parameters that are all in memory.

    Raises: DamagedCheckpoint: the parameters are not those of the network.
    """
    tree = dict(exported.params) | ({"classes": exported.classes} if config["num_classes"] else {})
    found = {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
    left_out = [name for name in opt_config.DECODERS if not config[name]]
    found = {path: leaf for path, leaf in found.items() if path.split("/")[0] not in left_out}
    shapes = opt.shapes(config)
    if shapes != {path: leaf.shape for path, leaf in found.items()}:
        different = sorted(p for p in {*shapes, *found} if shapes.get(p) != np.shape(found.get(p)))
        raise DamagedCheckpoint(f"the parameters are not those of the configuration: {', '.join(different)}")
    statistics = {f"embedder.{name}": getattr(exported.statistics, name) for name in opt.STATISTICS}
    lines = opt.table(config)
    tensors = planned(lines, shapes, dict.fromkeys(shapes, dtype))
    # A mean may be many deviations: rounded to a half dtype it would move what is standardised.
    wide = "float64" if dtype == "float64" else "float32"
    tensors += [Planned(name, array.shape, wide) for name, array in statistics.items()]
    leaves = numbers(lines, shapes, lambda path: np.asarray(found[path]))
    return tensors, itertools.chain(leaves, map(np.asarray, statistics.values()))
