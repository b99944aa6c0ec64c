"""UNITER (arXiv 1909.11740), uniter-base.pt and uniter-large.pt: BERT's table and the picture's side of OPT.

UNITER reads region features as the detector gives them, OPT standardised ones; `for_standardised_regions`
folds the difference into the projection. Its output for masked regions predicts raw features through the
transposed projection, which no choice of parameters here does: that head keeps its hidden layer, its bias
starts fresh. UNITER's matching has two classes, OPT's five: left out.
"""

import re
from collections.abc import Mapping

import numpy as np
from ml_collections import ConfigDict

from opt_jax.convert import bert
from opt_jax.convert.table import Row

HEAD_SIZE = 64  # of both published sizes; the arrays do not tell


def configuration(arrays: Mapping[str, np.ndarray]) -> ConfigDict:
    """The fields of `config.model` that the checkpoint decides, `vocab_size` and `region_size`.

    Raises: ValueError: an array that tells a size is missing.
    """
    needed = {
        "words": "uniter.embeddings.word_embeddings.weight",
        "positions": "uniter.embeddings.position_embeddings.weight",
        "mlp": "uniter.encoder.layer.0.intermediate.dense.weight",
        "regions": "uniter.img_embeddings.img_linear.weight",
    }
    missing = [name for name in needed.values() if name not in arrays]
    if missing:
        raise ValueError(f"there is no {', '.join(missing)}; is it a checkpoint of UNITER?")
    shape = {what: arrays[name].shape for what, name in needed.items()}
    layers = [re.match(r"uniter\.encoder\.layer\.(\d+)\.", name) for name in arrays]
    width = shape["words"][1]
    return ConfigDict(
        dict(
            hidden_size=width,
            num_layers=1 + max(int(match[1]) for match in layers if match),
            num_heads=max(1, width // HEAD_SIZE),
            mlp_size=shape["mlp"][0],
            max_text_positions=shape["positions"][0],
            layer_norm_epsilon=1e-12,
            vocab_size=shape["words"][0],
            region_size=shape["regions"][1],
            pre_norm=False,
        )
    )


def shapes(config: ConfigDict, arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    """Shapes, by path, of the parameters of `opt_jax.models.opt.OPT` that the checkpoint has."""
    d, f = config.hidden_size, config.region_size
    result = bert.shapes(config, arrays) | {
        "embedder/region_projection/kernel": (f, d),
        "embedder/region_projection/bias": (d,),
        "embedder/box_projection/kernel": (7, d),
        "embedder/box_projection/bias": (d,),
        "embedder/region_mask": (1, f),
    }
    norms = ["embedder/region_norm", "embedder/box_norm", "embedder/image_norm"]
    for theirs, ours in (("feat_regress", "region"), ("region_classifier", "region_class")):
        if f"{theirs}.net.0.weight" in arrays:
            result |= {f"heads/{ours}_dense/kernel": (d, d), f"heads/{ours}_dense/bias": (d,)}
            norms.append(f"heads/{ours}_norm")
    if "region_classifier.net.3.weight" in arrays:
        classes = arrays["region_classifier.net.3.weight"].shape[0]
        result |= {"heads/classes/kernel": (d, classes), "heads/classes/bias": (classes,)}
    return result | {f"{norm}/{leaf}": (d,) for norm in norms for leaf in ("scale", "bias")}


def rows(config: ConfigDict) -> list[Row]:
    """The table, after BERT's."""

    def matrix(weight):
        return weight.T

    def masked(embedding):
        return embedding[1:]  # row 0 is that of regions that are shown

    def linear(theirs, ours):
        return [Row(rf"{theirs}\.weight", f"{ours}/kernel", matrix), Row(rf"{theirs}\.bias", f"{ours}/bias")]

    def norm(theirs, ours):
        return [Row(rf"{theirs}\.weight", f"{ours}/scale"), Row(rf"{theirs}\.bias", f"{ours}/bias")]

    image = r"uniter\.img_embeddings\."
    return [
        *bert.rows(config),
        *linear(image + "img_linear", "embedder/region_projection"),
        *linear(image + "pos_linear", "embedder/box_projection"),
        *norm(image + "img_layer_norm", "embedder/region_norm"),
        *norm(image + "pos_layer_norm", "embedder/box_norm"),
        *norm(image + "LayerNorm", "embedder/image_norm"),
        Row(image + r"mask_embedding\.weight", "embedder/region_mask", masked),
        *linear(r"feat_regress\.net\.0", "heads/region_dense"),
        *norm(r"feat_regress\.net\.2", "heads/region_norm"),
        *linear(r"region_classifier\.net\.0", "heads/region_class_dense"),
        *norm(r"region_classifier\.net\.2", "heads/region_class_norm"),
        *linear(r"region_classifier\.net\.3", "heads/classes"),
        Row(r"feat_regress\.(?:weight|bias)|itm_output\..*", None),
    ]


def for_standardised_regions(params: Mapping, mean: np.ndarray, deviation: np.ndarray) -> dict:
    """The parameters for features (raw - mean) / deviation, mean and deviation [F], instead of raw ones.

    A masked region's feature, raw, is the mask embedding itself. Parameters without a region projection are
    returned as they are.
    """
    embedder = dict(params.get("embedder", {}))
    if "region_projection" not in embedder:
        return dict(params)
    kernel, bias = (np.asarray(embedder["region_projection"][leaf]) for leaf in ("kernel", "bias"))
    embedder["region_projection"] = {"kernel": kernel * deviation[:, None], "bias": bias + mean @ kernel}
    embedder["region_mask"] = (np.asarray(embedder["region_mask"]) - mean) / deviation
    return dict(params) | {"embedder": embedder}
