"""Weights from PyTorch, and to it. `import` makes directories of published weights: frozen encoders for
`config.encoders.<name>.pretrained`, BERT, UNITER and an exported OPT for `config.initial_parameters`.

    python -m opt_jax.convert import --kind=wav2vec2 --source=facebook/wav2vec2-base-960h --out=wav2vec2-base
    python -m opt_jax.convert import --kind=dvae --source=FOLDER_WITH_ENCODER_AND_DECODER_PKL --out=dvae
    python -m opt_jax.convert import --kind=faster_rcnn --source=faster_rcnn_from_caffe_attr.pkl --out=vg
    python -m opt_jax.convert import --kind=bert --source=bert-base-uncased --out=bert
    python -m opt_jax.convert import --kind=uniter --source=uniter-base.pt --out=uniter
    python -m opt_jax.convert import --kind=opt --source=exported --out=opt

A source is a file, a folder, or a name on the Hugging Face hub where there is a network.

`export` makes a folder that PyTorch loads, with torch and transformers alone, of what was trained here: of a
working directory, or of a step in its checkpoints. `import --kind=opt` brings its network back, and the other
kinds its frozen encoders: `--kind=wav2vec2 --source=exported/wav2vec2`, and so on.

    python -m opt_jax.convert export --checkpoint=runs/tiny --out=exported
    python -m opt_jax.convert export --checkpoint=runs/tiny/checkpoints/pretrain/1000 --out=exported
"""

import argparse
import json
import signal
import sys
from pathlib import Path

from flax.traverse_util import unflatten_dict
from ml_collections import ConfigDict

from opt_jax.convert import bert, dvae, faster_rcnn, frozen, opt, opt_config, uniter, wav2vec2
from opt_jax.convert.export import PARTS, export
from opt_jax.convert.place import beside, reason, sha256, straight
from opt_jax.convert.shards import DTYPES, ExportError
from opt_jax.convert.sources import SourceFileError, read_arrays
from opt_jax.convert.table import ConversionError, convert
from opt_jax.encoders.frozen import save_frozen

WEIGHTS = (".safetensors", ".bin", ".pkl", ".pt", ".pth")
FOREIGN = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, MemoryError)
HUB_FILES = ["*.json", "*.safetensors", "pytorch_model.bin", "*.pkl"]


def import_wav2vec2(source: Path) -> tuple[dict, dict]:
    """(parameters, configuration) of a folder with config.json, weights and, for CTC, vocab.json; where there
    is a preprocessor_config.json it says whether clips are normalised."""
    arrays = read_arrays(source)
    folder = source if source.is_dir() else source.parent
    vocabulary = folder / "vocab.json"
    letters = _read_json(vocabulary) if vocabulary.is_file() else None
    if letters is None and "lm_head.weight" in arrays:
        raise SourceFileError(f"{vocabulary} is missing: it names the letters of the CTC head")
    preprocessor = folder / "preprocessor_config.json"
    normalize = _read_json(preprocessor).get("do_normalize", True) if preprocessor.is_file() else True
    config = wav2vec2.configuration(_read_json(folder / "config.json"), letters, bool(normalize))
    shapes = wav2vec2.shapes(config, arrays)
    parameters = convert(arrays, wav2vec2.rows(config), shapes, f"{source} (wav2vec2)")
    return parameters, config.model.to_dict()


def import_dvae(source: Path) -> tuple[dict, dict]:
    """(parameters, configuration) of a folder with encoder.pkl and decoder.pkl, or of an exported one."""
    if frozen.is_module(source, "dvae"):
        config = frozen.module_config(source)
        return frozen.from_module(read_arrays(source), dvae.shapes(ConfigDict(config))), config
    arrays = {}
    for part in dvae.PARTS:
        arrays |= {f"{part}.{name}": array for name, array in read_arrays(source / f"{part}.pkl").items()}
    config = dvae.configuration(arrays)
    parameters = convert(arrays, dvae.rows(), dvae.shapes(config), f"{source} (dvae)")
    return parameters, config.to_dict()


def import_bert(source: Path) -> tuple[dict, dict]:
    """(parameters, configuration) of a folder with config.json and weights."""
    arrays = read_arrays(source)
    config = bert.configuration(_read_json((source if source.is_dir() else source.parent) / "config.json"))
    parameters = convert(arrays, bert.rows(config), bert.shapes(config, arrays), f"{source} (bert)")
    return parameters, config.to_dict()


def import_faster_rcnn(source: Path) -> tuple[dict, dict]:
    """(parameters, configuration) of a file of arrays in detectron2's names, or of an exported folder."""
    if frozen.is_module(source, "detector"):
        config = frozen.module_config(source)
        return frozen.from_module(read_arrays(source), faster_rcnn.shapes(ConfigDict(config))), config
    arrays = read_arrays(source)
    config = faster_rcnn.configuration(arrays)
    table, shapes = faster_rcnn.rows(config), faster_rcnn.shapes(config)
    return convert(arrays, table, shapes, f"{source} (faster_rcnn)"), config.to_dict()


def import_uniter(source: Path) -> tuple[dict, dict]:
    """(parameters, configuration) of uniter-base.pt or uniter-large.pt."""
    arrays = read_arrays(source)
    config = uniter.configuration(arrays)
    table, shapes = uniter.rows(config), uniter.shapes(config, arrays)
    return convert(arrays, table, shapes, f"{source} (uniter)"), config.to_dict()


def import_opt(source: Path) -> tuple[dict, dict]:
    """(parameters, configuration) of a folder that `export` made, fine-tuned in PyTorch or not."""
    arrays = read_arrays(source)
    folder = source if source.is_dir() else source.parent
    config = opt_config.configuration(_read_json(folder / "config.json"))
    shapes = opt.shapes(config)
    opt_config.check_size(shapes, arrays)
    parameters = convert(arrays, opt.rows(config, shapes), shapes, f"{source} (opt)")
    return parameters, opt_config.initial_configuration(config)


KINDS = {
    "bert": import_bert,
    "dvae": import_dvae,
    "faster_rcnn": import_faster_rcnn,
    "opt": import_opt,
    "uniter": import_uniter,
    "wav2vec2": import_wav2vec2,
}


def main(arguments=None) -> None:
    form = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser("opt_jax.convert", **form)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("import").add_argument
    add("--kind", required=True, choices=sorted(KINDS))
    add("--source", required=True, help="a file, a folder, or a name on the hub")
    add("--out", required=True, type=Path, help="a folder that is not there yet")
    add = commands.add_parser("export").add_argument
    add("--checkpoint", required=True, help="a training's workdir, or a step in its checkpoints")
    add("--out", required=True, type=Path, help="the folder to make")
    add("--pretrained", help="of a fine-tuning: where the pre-training is now, if no longer where it was")
    add("--dtype", default="float32", choices=DTYPES, help="of the weights")
    add("--only", default="all", choices=PARTS, help="encoder: without the decoders")
    add("--force", action="store_true", help="replace an exported folder")
    flags = parser.parse_args(arguments)
    if flags.command == "export":
        run_export(flags)
        return
    try:
        run_import(flags.kind, flags.source, flags.out)
    except ConversionError as error:
        print("\n".join(error.differences))  # all of them; the message has the first
        sys.exit(f"opt_jax: {error}")
    except (SourceFileError, ValueError) as error:
        sys.exit(f"opt_jax: {error}")
    except OSError as error:
        sys.exit(f"opt_jax: {reason(error, flags.out)}")


def run_export(flags: argparse.Namespace) -> None:
    """Exports; ends with one message where the checkpoint or the folder is not as it must be."""
    # Not above: it defines flags, which other programs that import this module have no use for.
    from opt_jax.main import expected_errors

    options = {"pretrained": flags.pretrained, "dtype": flags.dtype, "only": flags.only, "force": flags.force}
    try:
        export(flags.checkpoint, flags.out, **options)
    except (*expected_errors(), ExportError) as error:
        sys.exit(f"opt_jax: {error}")
    except OSError as error:
        sys.exit(f"opt_jax: {reason(error, flags.out)}")
    for file in sorted(path for path in flags.out.rglob("*") if path.is_file()):
        print(f"{str(file.relative_to(flags.out)):40} {file.stat().st_size:,} bytes")
    print(f"{flags.checkpoint} is exported to {flags.out}")


def run_import(kind: str, source: str, out: Path) -> None:
    """Converts, and writes the frozen encoder, whole or not at all.

    Raises ConversionError, SourceFileError or ValueError, and OSError where `out` cannot be written.
    """
    out = straight(out)
    if out.exists() or out.is_symlink():
        raise SourceFileError(f"{out} exists; name a folder that is not there yet")
    path = found(source)
    try:
        parameters, config = KINDS[kind](path)
    except (ConversionError, SourceFileError):
        raise
    except FOREIGN as error:  # what tells the sizes is missing, or of another kind
        told = str(error).strip() or type(error).__name__
        told = f"{told} is missing" if isinstance(error, KeyError) else told.splitlines()[0]
        raise SourceFileError(f"{path} (as {kind}): {told}") from error
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    weights = {file.name: sha256(file) for file in files if file.suffix in (*WEIGHTS, ".json")}
    made_of = {"source": source, "source_sha256": weights}
    with beside(out) as aside:
        save_frozen(aside, unflatten_dict(parameters, sep="/"), config, made_of)
    for name, array in sorted(parameters.items()):
        print(f"{name:64} {list(array.shape)}")
    total = sum(array.size for array in parameters.values())
    print(f"{len(parameters)} parameters, {total:,} numbers, from {source} in {out}")


def found(source: str) -> Path:
    """The file or folder of a source; one on the hub is fetched."""
    path = Path(source)
    if path.exists():
        return path
    if source.count("/") > 1 or source.startswith(("/", ".", "~")):
        raise SourceFileError(f"{source}: there is no such file or folder")
    from huggingface_hub import snapshot_download  # comes with transformers

    try:
        return Path(snapshot_download(source, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub's client raises many kinds, offline and on
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise SourceFileError(f"{source} is neither here nor on the hub: {reason}") from error


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SourceFileError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise SourceFileError(f"{path}: expected an object of fields, found {type(content).__name__}")
    return content


def _stop(number: int, _) -> None:
    """Of SIGTERM and Ctrl-C: ends as an error does, so that what is half written is removed."""
    for each in (signal.SIGTERM, signal.SIGINT):  # another one would interrupt the removal
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt(number)


if __name__ == "__main__":
    for one in (signal.SIGTERM, signal.SIGINT):
        signal.signal(one, _stop)
    try:
        main()
    except KeyboardInterrupt as stop:
        print("opt_jax: stopped; nothing is left that is half written", file=sys.stderr)
        sys.exit(128 + stop.args[0])
