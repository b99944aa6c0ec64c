"""BERT (arXiv 1810.04805) as transformers stores it, for OPT's text embedder, encoder and masked-word head.

Letters: L layers, D width, H heads, K = D / H, F feed-forward, W words, P positions. Poolers, next-sentence
heads and the output that is tied to the words are left out.
"""

from collections.abc import Iterable, Mapping

import numpy as np
from ml_collections import ConfigDict

from opt_jax.convert.table import Row, layer

TYPES = 3  # text, image, audio
MODEL_FIELDS = {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "mlp_size",
    "max_position_embeddings": "max_text_positions",
    "layer_norm_eps": "layer_norm_epsilon",
}


def configuration(published: Mapping) -> ConfigDict:
    """The fields of `config.model` that the checkpoint decides, and `vocab_size`, from its config.json.

    Raises: ValueError: a field is missing, or asks for what is not built here.
    """
    expected = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
    for field, value in expected.items():
        if (found := published.get(field, value)) != value:
            raise ValueError(f"config.json: {field} is {found!r}, expected {value!r}")
    missing = [name for name in (*MODEL_FIELDS, "vocab_size") if name not in published]
    if missing:
        raise ValueError(f"config.json has no {', '.join(missing)}")
    fields = {ours: published[theirs] for theirs, ours in MODEL_FIELDS.items()}
    return ConfigDict(fields | dict(vocab_size=published["vocab_size"], pre_norm=False))


def shapes(config: ConfigDict, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Shapes, by path, of the parameters of `opt_jax.models.opt.OPT` that a checkpoint of these names has."""
    n, d, h, f = config.num_layers, config.hidden_size, config.num_heads, config.mlp_size
    k, stack = d // h, "encoder/layers"
    result = {
        "embedder/words": (config.vocab_size, d),
        "embedder/text_positions": (config.max_text_positions, d),
        "embedder/types": (TYPES, d),
        "embedder/text_norm/scale": (d,),
        "embedder/text_norm/bias": (d,),
        f"{stack}/qkv/kernel": (n, d, 3, h, k),
        f"{stack}/qkv/bias": (n, 3, h, k),
        f"{stack}/self_out/kernel": (n, h, k, d),
        f"{stack}/self_out/bias": (n, d),
        f"{stack}/mlp_in/kernel": (n, d, f),
        f"{stack}/mlp_in/bias": (n, f),
        f"{stack}/mlp_out/kernel": (n, f, d),
        f"{stack}/mlp_out/bias": (n, d),
    }
    result |= {
        f"{stack}/{norm}/{leaf}": (n, d) for norm in ("self_norm", "mlp_norm") for leaf in ("scale", "bias")
    }
    if any(name.startswith("cls.predictions.") for name in names):
        result |= {"heads/word_dense/kernel": (d, d), "heads/word_bias": (config.vocab_size,)}
        result |= {f"heads/{name}": (d,) for name in ("word_dense/bias", "word_norm/scale", "word_norm/bias")}
    return result


def rows(config: ConfigDict) -> list[Row]:
    """The table. Norms are called weight and bias, in old files gamma and beta."""
    heads = config.num_heads

    def matrix(weight):
        return weight.T

    def into_heads(weight):
        return weight.T.reshape(weight.shape[1], heads, -1)

    def bias_of_heads(bias):
        return bias.reshape(heads, -1)

    def from_heads(weight):
        return weight.T.reshape(heads, -1, weight.shape[0])

    def with_audio(types):
        """[2, D], BERT's two segments, for text and image; audio starts at zero."""
        return np.concatenate([types, np.zeros((TYPES - len(types), types.shape[1]), types.dtype)])

    def norm(theirs, ours, **options):
        return [
            Row(rf"{theirs}\.(?:weight|gamma)", f"{ours}/scale", **options),
            Row(rf"{theirs}\.(?:bias|beta)", f"{ours}/bias", **options),
        ]

    def linear(theirs, ours, transform=matrix, **options):
        return [
            Row(rf"{theirs}\.weight", f"{ours}/kernel", transform, **options),
            Row(rf"{theirs}\.bias", f"{ours}/bias", **options),
        ]

    core, head = r"(?:bert\.|uniter\.)?", r"cls\.predictions\."
    block, to = core + r"encoder\.layer\.(\d+)\.", "encoder/layers"
    table = [
        Row(core + r"embeddings\.word_embeddings\.weight", "embedder/words"),
        Row(core + r"embeddings\.position_embeddings\.weight", "embedder/text_positions"),
        Row(core + r"embeddings\.token_type_embeddings\.weight", "embedder/types", with_audio),
        *norm(core + r"embeddings\.LayerNorm", "embedder/text_norm"),
    ]
    for number, name in enumerate(("query", "key", "value")):
        part = block + rf"attention\.self\.{name}\."

        def kernel_place(match, number=number):
            return (int(match[1]), None, number)

        def bias_place(match, number=number):
            return (int(match[1]), number)

        table.append(Row(part + "weight", f"{to}/qkv/kernel", into_heads, kernel_place))
        table.append(Row(part + "bias", f"{to}/qkv/bias", bias_of_heads, bias_place))
    return [
        *table,
        *linear(block + r"attention\.output\.dense", f"{to}/self_out", from_heads, place=layer),
        *norm(block + r"attention\.output\.LayerNorm", f"{to}/self_norm", place=layer),
        *linear(block + r"intermediate\.dense", f"{to}/mlp_in", place=layer),
        *linear(block + r"output\.dense", f"{to}/mlp_out", place=layer),
        *norm(block + r"output\.LayerNorm", f"{to}/mlp_norm", place=layer),
        *linear(head + r"transform\.dense", "heads/word_dense"),
        *norm(head + r"transform\.LayerNorm", "heads/word_norm"),
        Row(head + "bias", "heads/word_bias"),
        Row(head + r"decoder\.(?:weight|bias)", None),
        Row(core + r"(?:pooler\..*|embeddings\.position_ids)", None),
        Row(r"cls\.seq_relationship\..*", None),
    ]
