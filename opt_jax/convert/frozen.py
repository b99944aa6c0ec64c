"""The frozen encoders of an exported folder, each in a folder of its own.

wav2vec 2.0 is written as transformers stores it. The detector and the discrete VAE are written for the
modules of opt_jax/export, which name their parameters as the ones here. Each tensor keeps its dtype, with
which the features were made.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open

from opt_jax.convert import wav2vec2
from opt_jax.convert.layout import (
    CONVOLUTION,
    FLAT,
    FROM_HEADS,
    MATRIX,
    SAME,
    Layout,
    Pair,
    numbers,
    planned,
)
from opt_jax.convert.shards import CODES, ExportError, Planned, write_weights
from opt_jax.encoders.frozen import load_config
from opt_jax.encoders.wav2vec2 import SAMPLE_RATE

MODULES = {"detector": "opt_jax_detector", "dvae": "opt_jax_dvae"}  # model_type in config.json, by folder
LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
FILTERS = Layout(lambda x: x.transpose(3, 2, 0, 1), lambda x, shape: x.transpose(2, 3, 1, 0))
LENGTHS = Layout(lambda x: x[None, None], lambda x, shape: x.reshape(shape))  # of weight norm
ENTRIES = Layout(lambda x: x.reshape(1, -1, x.shape[-1]), lambda x, shape: x.reshape(shape))


@dataclass(frozen=True)
class Frozen:
    """A frozen encoder's directory as something to write: a leaf at a time.

    Attributes:
      directory: of `opt_jax.encoders.frozen`. shapes: of its parameters by path. lines: its table.
      tensors: to write. files: what stands beside the weights, by name, for JSON.
    """

    directory: Path
    shapes: Mapping[str, tuple[int, ...]]
    lines: list[Pair]
    tensors: list[Planned]
    files: Mapping[str, dict]

    def values(self) -> Iterator[np.ndarray]:
        with safe_open(self.directory / "model.safetensors", framework="numpy") as file:
            yield from numbers(self.lines, self.shapes, file.get_tensor)

    def write(self, folder: Path, limit: int) -> None:
        """Makes the folder; limit: bytes of one file of weights."""
        folder.mkdir()
        write_weights(folder, self.tensors, self.values(), limit)
        for name, content in self.files.items():
            (folder / name).write_text(json.dumps(content, indent=1) + "\n")


def frozen(name: str, directory: Path) -> Frozen:
    """The encoder `name` ('detector', 'wav2vec2' or 'dvae') in a directory, which was verified.

    Raises: ExportError: a parameter holds no floats.
    """
    known = {code: dtype for dtype, code in CODES.items()}
    with safe_open(directory / "model.safetensors", framework="numpy") as file:
        slices = {path: file.get_slice(path) for path in file.keys()}
        shapes = {path: tuple(part.get_shape()) for path, part in slices.items()}
        codes = {path: part.get_dtype() for path, part in slices.items()}
    if strange := [f"{path} ({code})" for path, code in sorted(codes.items()) if code not in known]:
        raise ExportError(
            f"{directory} holds parameters that are no floats: {', '.join(strange[:5])}; make the encoder"
            " again with floats"
        )
    dtypes, config = {path: known[code] for path, code in codes.items()}, load_config(directory)
    if name == "wav2vec2":
        lines, files = wav2vec2_lines(config, shapes), wav2vec2_files(config, shapes)
    else:
        lines, files = module_lines(shapes), {"config.json": {"model_type": MODULES[name]} | config}
    return Frozen(directory, shapes, lines, planned(lines, shapes, dtypes), files)


# --- the modules of opt_jax/export -------------------------------------------------------------------------


def module_lines(shapes: Mapping[str, tuple[int, ...]]) -> list[Pair]:
    """Parts of a path are joined by '.', and the last is what torch calls it."""
    lines = []
    for path, shape in shapes.items():
        *parts, leaf = path.split("/")
        layout = {4: FILTERS, 2: MATRIX}[len(shape)] if leaf == "kernel" else SAME
        lines.append(Pair(".".join((*parts, LEAVES[leaf])), path, layout))
    return lines


def is_module(source: Path, name: str) -> bool:
    """Whether a folder holds the detector or the discrete VAE as an exported model does."""
    try:
        config = json.loads((source / "config.json").read_text())
        return config.get("model_type") == MODULES[name]
    except (OSError, ValueError, AttributeError):
        return False


def module_config(source: Path) -> dict:
    config = json.loads((source / "config.json").read_text())
    return {field: value for field, value in config.items() if field != "model_type"}


def from_module(
    arrays: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """Parameters by path of the tensors that `module_lines` names.

    Raises: ValueError: a tensor is missing, unknown, of another shape, or holds no floats.
    """
    lines = {line.name: line for line in module_lines(shapes)}
    if different := sorted(lines.keys() ^ arrays.keys()):
        raise ValueError(f"tensors are missing or unknown: {', '.join(different[:5])}")
    found = {}
    for name, line in lines.items():
        if arrays[name].dtype.kind != "f":
            raise ValueError(f"{name} holds {arrays[name].dtype}, expected floats")
        parameter = line.layout.to_parameter(arrays[name], shapes[line.path])
        if parameter.shape != shapes[line.path]:
            raise ValueError(f"{name} is {list(arrays[name].shape)}, which is no {list(shapes[line.path])}")
        found[line.path] = np.ascontiguousarray(parameter)
    return found


# --- wav2vec 2.0 -------------------------------------------------------------------------------------------


def wav2vec2_lines(config: Mapping, shapes: Mapping[str, tuple[int, ...]]) -> list[Pair]:
    """The table for the parameters that there are, of the encoder and of either head."""
    alone = all(path.startswith("wav2vec2/") for path in shapes)
    core, to = "" if alone else "wav2vec2.", "wav2vec2"

    def linear(name, path):
        return [Pair(f"{name}.weight", f"{path}/kernel", MATRIX), Pair(f"{name}.bias", f"{path}/bias")]

    def norm(name, path, joint="/"):
        return [Pair(f"{name}.weight", f"{path}{joint}scale"), Pair(f"{name}.bias", f"{path}{joint}bias")]

    lines = [Pair(f"{core}masked_spec_embed", f"{to}/mask_embedding")]
    for number in range(len(config["conv_dim"])):
        name = f"{core}feature_extractor.conv_layers.{number}"
        path = f"{to}/feature_encoder/conv_{number}"
        lines.append(Pair(f"{name}.conv.weight", f"{path}/kernel", CONVOLUTION))
        lines.append(Pair(f"{name}.conv.bias", f"{path}/bias"))
        lines += norm(f"{name}.layer_norm", path, "/norm_" if config["feature_norm"] == "group" else "/norm/")
    lines += norm(f"{core}feature_projection.layer_norm", f"{to}/projection_norm")
    lines += linear(f"{core}feature_projection.projection", f"{to}/projection")
    position = f"{core}encoder.pos_conv_embed.conv"
    lines.append(Pair(f"{position}.bias", f"{to}/position/bias"))
    lines.append(Pair(f"{position}.parametrizations.weight.original0", f"{to}/position/g", LENGTHS))
    lines.append(Pair(f"{position}.parametrizations.weight.original1", f"{to}/position/v", CONVOLUTION))
    lines += norm(f"{core}encoder.layer_norm", f"{to}/norm")

    layer, layers = f"{core}encoder.layers.{{}}", f"{to}/layers"
    for name, path in (("q", "query"), ("k", "key"), ("v", "value")):
        projection, path = f"{layer}.attention.{name}_proj", f"{layers}/attention/{path}"
        lines.append(Pair(f"{projection}.weight", f"{path}_kernel", MATRIX))
        lines.append(Pair(f"{projection}.bias", f"{path}_bias", FLAT))
    output = f"{layers}/attention/output"
    lines.append(Pair(f"{layer}.attention.out_proj.weight", f"{output}_kernel", FROM_HEADS))
    lines.append(Pair(f"{layer}.attention.out_proj.bias", f"{output}_bias"))
    lines += linear(f"{layer}.feed_forward.intermediate_dense", f"{layers}/intermediate")
    lines += linear(f"{layer}.feed_forward.output_dense", f"{layers}/output")
    lines += norm(f"{layer}.layer_norm", f"{layers}/attention_norm")
    lines += norm(f"{layer}.final_layer_norm", f"{layers}/feed_forward_norm")

    lines.append(Pair("quantizer.codevectors", "quantizer/codebooks", ENTRIES))
    heads = {"quantizer.weight_proj": "quantizer/logits", "project_hid": "project_context"}
    for name, path in (heads | {"project_q": "project_targets", "lm_head": "ctc_head"}).items():
        lines += linear(name, path)
    lines = [line for line in lines if line.path in shapes]
    if left := sorted(set(shapes) - {line.path for line in lines}):
        raise ValueError(f"transformers' wav2vec 2.0 has no place for {', '.join(left[:5])}")
    return lines


def wav2vec2_files(config: Mapping, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, dict]:
    """What transformers wants beside the weights; `opt_jax_features` says which states are the features."""
    written = {theirs: config[ours] for theirs, ours in wav2vec2.MODEL_FIELDS.items()}
    quantizer = dict(num_codevector_groups=2, num_codevectors_per_group=320, codevector_dim=256)
    quantizer |= dict(proj_codevector_dim=256, feat_quantizer_dropout=0.0)
    letters, architecture = list(config["vocabulary"]), "Wav2Vec2Model"
    if "quantizer/codebooks" in shapes:
        architecture, (groups, entries, size) = "Wav2Vec2ForPreTraining", shapes["quantizer/codebooks"]
        quantizer |= dict(num_codevector_groups=groups, num_codevectors_per_group=entries)
        quantizer |= dict(codevector_dim=groups * size)
        quantizer |= dict(proj_codevector_dim=shapes["project_targets/kernel"][1])
    elif "ctc_head/kernel" in shapes:
        architecture = "Wav2Vec2ForCTC"
    written |= {"model_type": "wav2vec2", "architectures": [architecture], **quantizer}
    written |= {"hidden_act": "gelu", "feat_extract_activation": "gelu"}
    written |= {"num_feat_extract_layers": len(config["conv_dim"]), "vocab_size": max(len(letters), 1)}
    written |= {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    written["opt_jax_features"] = config["features"]
    preparation = {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "feature_size": 1,
        "sampling_rate": SAMPLE_RATE,
        "do_normalize": config["normalize_waveforms"],
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": config["feature_norm"] == "layer",
    }
    files = {"config.json": written, "preprocessor_config.json": preparation}
    if architecture == "Wav2Vec2ForCTC":
        words = {"pad_token": letters[0], "unk_token": letters[0], "bos_token": None, "eos_token": None}
        words |= {"tokenizer_class": "Wav2Vec2CTCTokenizer", "word_delimiter_token": "|"}
        files["vocab.json"] = {letter: number for number, letter in enumerate(letters)}
        files["tokenizer_config.json"] = words
    return files
