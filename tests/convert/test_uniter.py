"""UNITER's weights in OPT, against its definition (arXiv 1909.11740, section 3.1) in torch around BERT."""

import jax
import numpy as np
import pytest

from opt_jax.convert.__main__ import main
from opt_jax.convert.uniter import for_standardised_regions
from opt_jax.encoders.frozen import load_frozen
from opt_jax.models.opt import OPT, Sizes
from opt_jax.partitioning import unbox
from opt_jax.state import with_initial

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
nn = torch.nn
D, F, WORDS, T, V, CLASSES = 64, 5, 23, 6, 4, 7


class Uniter(nn.Module):
    """The published names; one head of 64."""

    def __init__(self):
        super().__init__()
        config = transformers.BertConfig(
            vocab_size=WORDS, hidden_size=D, num_hidden_layers=2, num_attention_heads=1, intermediate_size=24,
            max_position_embeddings=9,
        )  # fmt: skip
        masked_words = transformers.BertForMaskedLM(config)
        self.uniter = masked_words.bert
        self.cls = masked_words.cls
        image = nn.Module()
        image.img_linear, image.pos_linear = nn.Linear(F, D), nn.Linear(7, D)
        image.img_layer_norm, image.pos_layer_norm = nn.LayerNorm(D, 1e-12), nn.LayerNorm(D, 1e-12)
        image.LayerNorm = nn.LayerNorm(D, 1e-12)
        image.mask_embedding = nn.Embedding(2, F)
        self.uniter.img_embeddings = image
        self.feat_regress = nn.Module()
        self.feat_regress.net = nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.LayerNorm(D, 1e-12))
        self.feat_regress.weight = image.img_linear.weight
        self.feat_regress.bias = nn.Parameter(torch.zeros(F))
        self.region_classifier = nn.Module()
        self.region_classifier.net = nn.Sequential(
            nn.Linear(D, D), nn.GELU(), nn.LayerNorm(D, 1e-12), nn.Linear(D, CLASSES)
        )
        self.itm_output = nn.Linear(D, 2)

    def forward(self, ids, features, boxes, masked, valid):
        image = self.uniter.img_embeddings
        features = torch.where(masked[..., None], image.mask_embedding.weight[1], features)
        regions = image.img_layer_norm(image.img_linear(features)) + image.pos_layer_norm(
            image.pos_linear(boxes)
        )
        regions = image.LayerNorm(regions + self.uniter.embeddings.token_type_embeddings.weight[1])
        x = torch.cat([self.uniter.embeddings(ids), regions], 1)
        bias = torch.zeros(valid.shape).masked_fill(~valid, -1e9)[:, None, None]
        for layer in self.uniter.encoder.layer:
            x = layer(x, attention_mask=bias)
            x = x[0] if isinstance(x, tuple) else x
        return x


def test_states_and_region_classes(tmp_path):
    torch.manual_seed(0)
    reference = Uniter().eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    torch.save(reference.state_dict(), tmp_path / "uniter.pt")
    main(["import", "--kind=uniter", f"--source={tmp_path / 'uniter.pt'}", f"--out={tmp_path / 'out'}"])
    params, found = load_frozen(tmp_path / "out")
    assert "uniter.pt" in (tmp_path / "out" / "metrics.json").read_text()
    assert found["num_layers"] == 2 and found["num_heads"] == 1 and found["region_size"] == F

    rng = np.random.default_rng(0)
    raw, mean, deviation = rng.normal(size=(2, V, F)) * 3 + 1, rng.normal(size=F), rng.uniform(0.5, 2, F)
    ids = rng.integers(0, WORDS, (2, T))
    valid = np.arange(T + V) != np.array([[T - 1], [T + V - 1]])  # one padded word, one padded region
    masked = np.zeros((2, V), bool)
    masked[:, 1] = True
    inputs = {
        "text_ids": ids,
        "text_valid": valid[:, :T],
        "region_features": ((raw - mean) / deviation).astype(np.float32),
        "region_boxes": rng.random((2, V, 7)).astype(np.float32),
        "region_masked": masked,
        "region_valid": valid[:, T:],
        "audio_features": np.zeros((2, 0, 2), np.float32),
        "audio_masked": np.zeros((2, 0), bool),
        "audio_valid": np.zeros((2, 0), bool),
    }
    decoder = dict(num_layers=1, num_heads=2, mlp_size=8)
    config = {key: value for key, value in found.items() if key not in ("vocab_size", "region_size")} | dict(
        dropout=0.0, num_alignment_layers=0, alignment_size=4, temperature_init=0.07, temperature_min=0.01,
        max_audio_positions=1, frame_window=0, remat=False, unroll=1, initializer_range=0.02, dtype="float32",
        text_decoder=decoder, image_decoder=decoder,
    )  # fmt: skip
    model = OPT(config, Sizes(WORDS, F, 2, num_region_classes=CLASSES - 1, num_codes=3, codes_per_image=1))
    fresh = unbox(jax.jit(model.init)(jax.random.key(0), inputs, np.zeros((2, 1), int))["params"])
    params = with_initial(fresh, for_standardised_regions(params, mean, deviation), "test")

    def ours(params, inputs):
        memory = model.apply({"params": params}, inputs, method="encode")[0]
        return memory, model.apply({"params": params}, memory, method="region_class_logits")

    memory, logits = jax.jit(ours)(params, inputs)
    tensors = [
        torch.from_numpy(x) for x in (ids, raw.astype(np.float32), inputs["region_boxes"], masked, valid)
    ]
    with torch.no_grad():
        states = reference(*tensors)
        classes = reference.region_classifier.net(states)
    np.testing.assert_allclose(np.asarray(memory)[valid], states.numpy()[valid], rtol=0, atol=1e-4)
    np.testing.assert_allclose(np.asarray(logits)[valid], classes.numpy()[valid], rtol=0, atol=1e-4)


def test_what_is_no_uniter_is_refused(tmp_path):
    torch.save({"x": torch.ones(2)}, tmp_path / "x.pt")
    with pytest.raises(SystemExit, match="is it a checkpoint of UNITER"):
        main(["import", "--kind=uniter", f"--source={tmp_path / 'x.pt'}", f"--out={tmp_path / 'out'}"])
