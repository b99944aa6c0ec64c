"""OPT's parameters and the tensors of its PyTorch model (opt_jax/export): one table, read in both directions.

Both sides call things alike, so most rows are written by few words. Matrices are transposed; heads, stacked
layers and fused projections are apart in one and together in the other. No number changes on the way.
"""

import re
from collections.abc import Mapping

import jax
import numpy as np

from opt_jax.convert.layout import CONVOLUTION, FLAT, FROM_HEADS, MATRIX, SAME, Pair
from opt_jax.convert.opt_config import DECODERS, MODEL_FIELDS, SIZE_FIELDS
from opt_jax.convert.table import Row, shapes_of
from opt_jax.models.opt import OPT, Sizes

STATISTICS = ("region_mean", "region_deviation", "audio_mean", "audio_deviation")


def table(config: Mapping) -> list[Pair]:
    """The lines for a model with these fields of config.json (see `MODEL_FIELDS`, `DECODERS`)."""

    def linear(name, path, layout=MATRIX, part=(), bias_part=(), bias_layout=SAME):
        return [
            Pair(f"{name}.weight", f"{path}/kernel", layout, part),
            Pair(f"{name}.bias", f"{path}/bias", bias_layout, bias_part),
        ]

    def norm(name, path):
        return [Pair(f"{name}.weight", f"{path}/scale"), Pair(f"{name}.bias", f"{path}/bias")]

    def attention(name, path, projections, output):
        """projections: (parameter, the tensors that it holds, in order)."""
        lines = linear(f"{name}.output", f"{path}/{output}", FROM_HEADS)
        for parameter, parts in projections:
            for number, part in enumerate(parts):
                places = {"part": (None, number), "bias_part": (number,)} if len(parts) > 1 else {}
                lines += linear(f"{name}.{part}", f"{path}/{parameter}", bias_layout=FLAT, **places)
        return lines

    def stack(name, path, cross):
        layer = f"{name}.layers.{{}}"
        own = [("qkv", ("query", "key", "value"))]
        lines = attention(f"{layer}.self_attention", path, own, "self_out")
        lines += norm(f"{layer}.self_attention_norm", f"{path}/self_norm")
        if cross:
            projections = [("query", ("query",)), ("memory", ("key", "value"))]
            lines += attention(f"{layer}.cross_attention", path, projections, "cross_out")
            lines += norm(f"{layer}.cross_attention_norm", f"{path}/cross_norm")
        for block in ("mlp_in", "mlp_out"):
            lines += linear(f"{layer}.{block}", f"{path}/{block}")
        lines += norm(f"{layer}.mlp_norm", f"{path}/mlp_norm")
        return lines + (norm(f"{name}.final_norm", f"{path}/final_norm") if config["pre_norm"] else [])

    lines = []
    for name in ("words", "text_positions", "types", "region_mask", "audio_mask", "audio_positions"):
        lines.append(Pair(f"embedder.{name}.weight", f"embedder/{name}"))
    for name in ("region_projection", "box_projection", "audio_projection"):
        lines += linear(f"embedder.{name}", f"embedder/{name}")
    for name in ("text_norm", "region_norm", "box_norm", "image_norm", "frame_norm", "audio_norm"):
        lines += norm(f"embedder.{name}", f"embedder/{name}")
    if config["frame_window"]:
        lines += linear("embedder.frame_convolution", "embedder/frame_convolution", CONVOLUTION)

    lines += stack("encoder", "encoder/layers", cross=False)
    if config["num_alignment_layers"]:
        lines += norm("encoder.alignment_norm", "encoder/alignment_norm")
        for name in ("text", "image", "audio"):
            lines += linear(f"encoder.alignment_projections.{name}", f"encoder/align_{name}")
        lines += linear("encoder.agreement", "encoder/agreement")
        lines.append(Pair("encoder.log_temperature", "encoder/log_temperature"))

    for decoder in (name for name in DECODERS if config[name]):
        lines += stack(decoder, f"{decoder}/layers", cross=True)
        lines += norm(f"{decoder}.embedding_norm", f"{decoder}/embedding_norm")
        for name in ("start", "positions", *(("symbols",) if decoder == "image_decoder" else ())):
            lines.append(Pair(f"{decoder}.{name}.weight", f"{decoder}/{name}"))
        lines.append(Pair(f"{decoder}.output_bias", f"{decoder}/output_bias"))

    for name in ("word", "region", "region_class", "frame"):
        lines += linear(f"heads.{name}_dense", f"heads/{name}_dense")
        lines += norm(f"heads.{name}_norm", f"heads/{name}_norm")
    lines += [Pair(f"heads.{name}_bias", f"heads/{name}_bias") for name in ("word", "region", "frame")]
    for name in ("classes", "matching"):
        lines += linear(f"heads.{name}", f"heads/{name}")
    return lines + (linear("classifier", "classes") if config["num_classes"] else [])


def rows(config: Mapping, shapes: Mapping[str, tuple[int, ...]]) -> list[Row]:
    """The table for `convert`, from tensors to parameters of these shapes."""
    found = [Row(rf"embedder\.(?:{'|'.join(STATISTICS)})", None)]
    for line in table(config):
        index = tuple(slice(None) if at is None else at for at in line.place(0))
        part = np.empty(shapes[line.path], bool)[index]  # of which only the shape counts

        def to_parameter(tensor, layout=line.layout, part=part):
            if tensor.shape != layout.to_tensor(part).shape:
                raise ValueError("another shape")
            return layout.to_parameter(tensor, part.shape)

        def place(match, line=line):
            return line.place(int(match[1]) if line.stacked else 0)

        pattern = re.escape(line.name).replace(r"\{\}", r"(\d+)")
        found.append(Row(pattern, line.path, to_parameter, place))
    return found


def shapes(config: Mapping) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters, by path, of a model with these fields of config.json."""
    settings = {name: config[name] for name in MODEL_FIELDS}
    left_out = [name for name in DECODERS if not config[name]]
    settings |= {name: dict(config[name] or dict(num_layers=1, num_heads=1, mlp_size=1)) for name in DECODERS}
    settings |= dict(dropout=0.0, initializer_range=0.02, remat=False, unroll=1, dtype="float32")
    settings |= dict(temperature_init=0.07, temperature_min=0.01)
    network = OPT(settings, Sizes(**{name: config[name] for name in SIZE_FIELDS}))
    found = shapes_of(jax.eval_shape(lambda: network.init(jax.random.key(0), *smallest_batch(network.sizes))))
    found = {path.removeprefix("params/"): shape for path, shape in found.items()}
    found = {path: shape for path, shape in found.items() if path.split("/")[0] not in left_out}
    if classes := config["num_classes"]:
        found |= {"classes/kernel": (4 * config["hidden_size"], classes), "classes/bias": (classes,)}
    return found


def smallest_batch(sizes: Sizes) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Inputs of one position of each modality, and codes, with which the network can be initialised."""
    one = np.ones((1, 1), bool)
    inputs = {f"{name}_valid": one for name in ("text", "region", "audio")}
    inputs |= {"text_ids": np.zeros((1, 2), np.int32), "text_valid": np.ones((1, 2), bool)}
    for name, size in (("region", sizes.region_size), ("audio", sizes.audio_size)):
        inputs |= {f"{name}_features": np.zeros((1, 1, size), np.float32), f"{name}_masked": ~one}
    inputs["region_boxes"] = np.zeros((1, 1, 7), np.float32)
    return inputs, np.zeros((1, sizes.codes_per_image), np.int32)
