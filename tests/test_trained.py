"""What `load_trained` refuses: a checkpoint that is not of the model that its working directory describes."""

import json
import re

import pytest

from opt_jax.trained import WorkdirError, load_trained


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("mlp_size", 40, "encoder/layers/mlp_in/bias is (2, {mlp_size}), but (2, 40) in the model"),
        ("num_alignment_layers", 0, "encoder/agreement/bias is (32,), but absent in the model"),
    ],
)
def test_a_checkpoint_of_another_shape_is_told(pretrained, tmp_path, field, value, message):
    for name in ("data", "encoders", "cache", "checkpoints"):
        (tmp_path / name).symlink_to(pretrained / name)
    config = json.loads((pretrained / "config.json").read_text())
    message = message.format(**config["model"])
    config["model"][field] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WorkdirError, match=re.escape(message)) as told:
        load_trained(tmp_path)
    assert "\n" not in str(told.value)
