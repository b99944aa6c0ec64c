"""wav2vec 2.0 as transformers stores it: Wav2Vec2Model, Wav2Vec2ForPreTraining or Wav2Vec2ForCTC.

The result holds whatever the checkpoint has: the encoder, and with it the quantizer and the two projections
of pre-training, or the CTC head and its letters.
"""

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from opt_jax.convert.table import Row, layer, shapes_of
from opt_jax.encoders.wav2vec2 import Wav2Vec2, Wav2Vec2ForCTC
from opt_jax.encoders.wav2vec2_quantizer import Wav2Vec2ForPretraining

# Fields of the model's configuration by their name in config.json.
MODEL_FIELDS = {
    "conv_dim": "conv_dim",
    "conv_kernel": "conv_kernel",
    "conv_stride": "conv_stride",
    "conv_bias": "conv_bias",
    "feat_extract_norm": "feature_norm",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "intermediate_size",
    "num_conv_pos_embeddings": "position_kernel",
    "num_conv_pos_embedding_groups": "position_groups",
    "do_stable_layer_norm": "stable_layer_norm",
    "layer_norm_eps": "layer_norm_eps",
    "initializer_range": "initializer_range",
    "feat_proj_dropout": "projection_dropout",
    "hidden_dropout": "hidden_dropout",
    "attention_dropout": "attention_dropout",
    "activation_dropout": "activation_dropout",
    "final_dropout": "final_dropout",
    "layerdrop": "layerdrop",
}
QUANTIZER_FIELDS = {
    "num_codevector_groups": "num_codebooks",
    "num_codevectors_per_group": "codebook_size",
    "codevector_dim": "codevector_dim",
    "proj_codevector_dim": "projection_dim",
    "feat_quantizer_dropout": "feature_dropout",
}


def configuration(
    published: Mapping, vocabulary: Mapping[str, int] | None = None, normalize: bool = True
) -> ConfigDict:
    """The configuration of configs/encoders/wav2vec2.py, parts `model` and `ssl`, from a config.json.

    vocabulary: letters to indices, as in vocab.json; without one the CTC head has no letters.
    normalize: do_normalize of preprocessor_config.json.
    Raises: ValueError: a field is missing, or asks for what is not built here.
    """
    for field, expected in (("model_type", "wav2vec2"), ("hidden_act", "gelu")):
        if (found := published.get(field, expected)) != expected:
            raise ValueError(f"config.json: {field} is {found!r}, expected {expected!r}")
    if published.get("add_adapter"):
        raise ValueError("config.json: add_adapter is true; adapters are not built here")
    missing = [name for name in (*MODEL_FIELDS, *QUANTIZER_FIELDS) if name not in published]
    if missing:
        raise ValueError(f"config.json has no {', '.join(missing)}")
    letters = sorted(vocabulary, key=vocabulary.get) if vocabulary else []
    if letters and sorted(vocabulary.values()) != list(range(len(letters))):
        raise ValueError("vocab.json: the indices of the letters are not 0, 1, 2, ...")

    def chosen(fields):
        values = {ours: published[theirs] for theirs, ours in fields.items()}
        return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}

    model = chosen(MODEL_FIELDS) | dict(
        unroll=1, vocabulary=tuple(letters), normalize_waveforms=normalize
    )
    model["features"] = published.get("opt_jax_features", "context")  # which an exported model tells
    return ConfigDict(dict(model=model, ssl=chosen(QUANTIZER_FIELDS)))


def shapes(config: ConfigDict, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters, by path, of the model that a checkpoint with these names is."""
    names = set(names)
    if any(name.startswith("quantizer.") for name in names):
        module = Wav2Vec2ForPretraining(config.model, config.ssl)
    elif any(name.startswith("lm_head.") for name in names):
        module = Wav2Vec2ForCTC(config.model)
    else:
        module = Wav2Vec2(config.model)
    waveforms, lengths = jnp.zeros((1, 16_000)), np.array([16_000])
    tree = jax.eval_shape(lambda: module.init(jax.random.key(0), waveforms, lengths, None)["params"])
    return shapes_of({"wav2vec2": tree} if isinstance(module, Wav2Vec2) else tree)


def rows(config: ConfigDict) -> list[Row]:
    """The table. Weight norm's g and v stay apart; old files call them weight_g and weight_v."""
    heads, codebooks = config.model.num_heads, config.ssl.num_codebooks

    def matrix(weight):
        return weight.T

    def convolution(weight):
        return weight.transpose(2, 1, 0)

    def into_heads(weight):
        return weight.T.reshape(weight.shape[1], heads, -1)

    def from_heads(weight):
        return weight.T.reshape(heads, -1, weight.shape[0])

    def bias_of_heads(bias):
        return bias.reshape(heads, -1)

    def entries(codevectors):
        return codevectors.reshape(codebooks, -1, codevectors.shape[-1])

    def linear(theirs, ours, place=None):
        options = {"place": place} if place else {}
        return [
            Row(rf"{theirs}\.weight", f"{ours}/kernel", matrix, **options),
            Row(rf"{theirs}\.bias", f"{ours}/bias", **options),
        ]

    def norm(theirs, ours, joint="/", **options):
        return [
            Row(rf"{theirs}\.weight", f"{ours}{joint}scale", **options),
            Row(rf"{theirs}\.bias", f"{ours}{joint}bias", **options),
        ]

    core, to = r"(?:wav2vec2\.)?", "wav2vec2"
    stem, stem_to = core + r"feature_extractor\.conv_layers\.(\d+)\.", to + r"/feature_encoder/conv_\1"
    position = core + r"encoder\.pos_conv_embed\.conv\."
    block, block_to = core + r"encoder\.layers\.(\d+)\.", f"{to}/layers"
    table = [
        Row(core + r"masked_spec_embed", f"{to}/mask_embedding"),
        Row(stem + r"conv\.weight", f"{stem_to}/kernel", convolution),
        Row(stem + r"conv\.bias", f"{stem_to}/bias"),
        *norm(stem + "layer_norm", stem_to, "/norm_" if config.model.feature_norm == "group" else "/norm/"),
        *norm(core + r"feature_projection\.layer_norm", f"{to}/projection_norm"),
        *linear(core + r"feature_projection\.projection", f"{to}/projection"),
        Row(position + "bias", f"{to}/position/bias"),
        Row(position + r"(?:parametrizations\.weight\.original0|weight_g)", f"{to}/position/g", np.ravel),
        Row(position + r"(?:parametrizations\.weight\.original1|weight_v)", f"{to}/position/v", convolution),
        *norm(core + r"encoder\.layer_norm", f"{to}/norm"),
    ]
    for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value")):
        path = f"{block_to}/attention/{ours}"
        table.append(Row(block + rf"attention\.{theirs}_proj\.weight", f"{path}_kernel", into_heads, layer))
        table.append(Row(block + rf"attention\.{theirs}_proj\.bias", f"{path}_bias", bias_of_heads, layer))
    return [
        *table,
        Row(block + r"attention\.out_proj\.weight", f"{block_to}/attention/output_kernel", from_heads, layer),
        Row(block + r"attention\.out_proj\.bias", f"{block_to}/attention/output_bias", place=layer),
        *linear(block + r"feed_forward\.intermediate_dense", f"{block_to}/intermediate", layer),
        *linear(block + r"feed_forward\.output_dense", f"{block_to}/output", layer),
        *norm(block + "layer_norm", f"{block_to}/attention_norm", place=layer),
        *norm(block + "final_layer_norm", f"{block_to}/feed_forward_norm", place=layer),
        Row(r"quantizer\.codevectors", "quantizer/codebooks", entries),
        *linear(r"quantizer\.weight_proj", "quantizer/logits"),
        *linear("project_hid", "project_context"),
        *linear("project_q", "project_targets"),
        *linear("lm_head", "ctc_head"),
    ]
