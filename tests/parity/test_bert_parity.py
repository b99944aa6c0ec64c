"""Text embedder and post-norm stack against transformers' BertModel, layer by layer, in float64."""

import jax
import numpy as np
import pytest

from opt_jax.models.embeddings import Embedder
from opt_jax.models.layers import TransformerStack
from opt_jax.partitioning import unbox

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

B, T, D, H, F, L, WORDS, EPSILON = 3, 7, 16, 4, 24, 3, 19, 1e-12


def make_bert():
    """A BertModel with every parameter drawn anew, norms and biases too."""
    config = transformers.BertConfig(
        vocab_size=WORDS,
        hidden_size=D,
        num_hidden_layers=L,
        num_attention_heads=H,
        intermediate_size=F,
        max_position_embeddings=T + 2,
        layer_norm_eps=EPSILON,
        attn_implementation="eager",
    )
    bert = transformers.BertModel(config, add_pooling_layer=False).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in bert.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(parameter + 0.3 * noise)
    return bert


def stack_params(bert):
    """BERT's layers under this project's names, stacked along L."""
    state = {name: tensor.numpy() for name, tensor in bert.state_dict().items()}

    def stacked(name, leaf):
        return np.stack([state[f"encoder.layer.{i}.{name}.{leaf}"] for i in range(L)])

    def dense(name, shape, bias_shape):
        kernel = stacked(name, "weight").transpose(0, 2, 1).reshape(L, *shape)
        return {"kernel": kernel, "bias": stacked(name, "bias").reshape(L, *bias_shape)}

    def norm(name):
        return {"scale": stacked(name, "weight"), "bias": stacked(name, "bias")}

    names = [f"attention.self.{name}" for name in ("query", "key", "value")]
    query_key_value = [dense(name, (D, H, D // H), (H, D // H)) for name in names]
    return {
        "qkv": {
            "kernel": np.stack([part["kernel"] for part in query_key_value], 2),
            "bias": np.stack([part["bias"] for part in query_key_value], 1),
        },
        "self_out": dense("attention.output.dense", (H, D // H, D), (D,)),
        "self_norm": norm("attention.output.LayerNorm"),
        "mlp_in": dense("intermediate.dense", (D, F), (F,)),
        "mlp_out": dense("output.dense", (F, D), (D,)),
        "mlp_norm": norm("output.LayerNorm"),
    }


def embedder_params(bert):
    embeddings = bert.embeddings
    norm = embeddings.LayerNorm
    return {
        "words": embeddings.word_embeddings.weight,
        "text_positions": embeddings.position_embeddings.weight,
        "types": torch.cat([embeddings.token_type_embeddings.weight, torch.zeros(1, D)]),
        "text_norm": {"scale": norm.weight, "bias": norm.bias},
    }


def test_embeddings_and_every_layer():
    bert = make_bert()
    rng = np.random.default_rng(1)
    ids = rng.integers(0, WORDS, (B, T))
    valid = np.arange(T) < np.array([7, 4, 5])[:, None]
    with torch.no_grad():
        tensors = dict(
            input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(valid.astype(np.int64))
        )
        expected = [x.numpy() for x in bert(**tensors, output_hidden_states=True).hidden_states]

    embedder = Embedder(
        hidden_size=D,
        vocab_size=WORDS,
        region_size=2,
        audio_size=2,
        max_text_positions=T + 2,
        max_audio_positions=1,
        frame_window=0,
        epsilon=EPSILON,
        dropout_rate=0.1,
        stddev=0.02,
    )
    stack = TransformerStack(num_layers=L, hidden_size=D, num_heads=H, mlp_size=F, epsilon=EPSILON)

    def ours(embedder_params, stack_params, ids, valid):
        x = embedder.apply({"params": embedder_params}, ids, None, np.float64, method="text")
        found = [x]
        for i in range(L):
            run = dict(start=i, stop=i + 1)
            found.append(stack.apply({"params": stack_params}, found[-1], valid[:, None, None], **run))
        return found, stack.apply({"params": stack_params}, x, valid[:, None, None])

    with jax.enable_x64(True):
        # The embedder's other parameters stay as they are drawn; the text path does not read them.
        drawn = jax.jit(lambda: embedder.init(jax.random.key(0), ids, None, np.float64, method="text"))()
        given = jax.tree.map(lambda x: x.detach().numpy(), embedder_params(bert))
        params = unbox(drawn["params"]) | given
        found, whole = jax.device_get(jax.jit(ours)(params, stack_params(bert), ids, valid))

    assert len(found) == len(expected) == L + 1
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.dtype == np.float64 and np.abs(b).max() > 0.5
        np.testing.assert_allclose(a[valid], b[valid], rtol=1e-9, atol=1e-9, err_msg=f"hidden state {i}")
    np.testing.assert_allclose(whole, found[-1], rtol=1e-12, atol=1e-12)
