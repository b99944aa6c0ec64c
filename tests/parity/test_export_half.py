"""An export in bfloat16, beside its weights in float32: features far from 0 are standardised alike."""

import numpy as np
import pytest

from opt_jax.convert.export import Exported, write_folder
from opt_jax.models.inputs import Statistics
from opt_jax.models.opt import OPT

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from exported_toy import (  # noqa: E402
    SIZES,
    TOKENS,
    draw_params,
    make_batch,
    make_statistics,
    model_config,
    tensors_of,
)

from opt_jax.export.modeling_opt_jax import OptJaxModel  # noqa: E402

FAR = np.float32(300.3)  # of a mean, with deviations from 1 to 4; bfloat16 has numbers 2 apart there


def test_pictures_and_sound_agree_in_bfloat16(tmp_path):
    network, batch = OPT(model_config(True, 2, "float32"), SIZES), make_batch()
    batch = {name: x.astype(np.float32) if x.dtype == np.float64 else x for name, x in batch.items()}
    statistics = {name: x.astype(np.float32) for name, x in vars(make_statistics()).items()}
    for name in ("region", "audio"):
        batch[f"{name}_features"] += FAR
        statistics[f"{name}_mean"] += FAR
    exported = Exported(network, draw_params(network, np.float32), Statistics(**statistics), TOKENS)
    write_folder(exported, tmp_path / "out", dtype="bfloat16")
    found, expected = [], []
    for states, dtype in ((found, torch.bfloat16), (expected, torch.float32)):
        model = OptJaxModel.from_pretrained(tmp_path / "out", dtype=dtype)
        assert model.heads.word_bias.dtype == dtype
        for name, x in statistics.items():
            np.testing.assert_array_equal(getattr(model.embedder, name), x)
        with torch.no_grad():
            output = model(**tensors_of(batch, (True, True, True)), output_hidden_states=True)
        states += [x[output.attention_mask] for x in (*output.hidden_states, output.last_hidden_state)]
        states += [output.matching_logits, output.text_logits, output.image_logits]
    for one, other in zip(found, expected, strict=True):
        assert (one.float() - other).abs().max() < 2e-2 * other.abs().max()
