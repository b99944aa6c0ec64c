import numpy as np
import pytest
from ml_collections import ConfigDict

from opt_jax.encoders.frozen import FrozenEncoderError, digest, load_frozen, save_frozen


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    return {
        "encoder": {"conv": {"kernel": np.float32(rng.normal(size=(2, 3))), "bias": np.float16([1, 2])}},
        "step": np.int32(7),
        "mask": np.array([True, False]),
    }


def test_round_trip_keeps_bits_shapes_and_config(tmp_path, params):
    params["encoder"]["conv"]["kernel"][0, 0] = -0.0
    save_frozen(tmp_path / "a", params, ConfigDict({"width": 4, "inner": {"rate": 0.1}}), {"score": 0.5})
    loaded, config = load_frozen(tmp_path / "a")
    assert config == {"width": 4, "inner": {"rate": 0.1}}
    assert set(loaded) == {"encoder", "step", "mask"} and set(loaded["encoder"]["conv"]) == {"kernel", "bias"}
    for got, want in [
        (loaded["encoder"]["conv"]["kernel"], params["encoder"]["conv"]["kernel"]),
        (loaded["encoder"]["conv"]["bias"], params["encoder"]["conv"]["bias"]),
        (loaded["step"], params["step"]),
        (loaded["mask"], params["mask"]),
    ]:
        assert got.dtype == want.dtype and got.shape == want.shape and got.tobytes() == want.tobytes()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "config.json", "metrics.json", "model.safetensors", "model.sha256"]


def test_digest_depends_on_params_and_config_alone(tmp_path, params):
    save_frozen(tmp_path / "a", params, {"width": 4}, {"score": 1})
    save_frozen(tmp_path / "b", params, {"width": 4}, {"score": 2})
    save_frozen(tmp_path / "c", params, {"width": 5}, {"score": 1})
    save_frozen(tmp_path / "d", {**params, "step": np.int32(8)}, {"width": 4}, {"score": 1})
    digests = [digest(tmp_path / name) for name in "abcd"]
    assert digests[0] == digests[1] and len(set(digests)) == 3


@pytest.mark.parametrize("damage", ["flip", "truncate", "config", "unfinished", "absent"])
def test_damage_is_found_and_named(tmp_path, params, damage):
    save_frozen(tmp_path, params, {"width": 4}, {})
    model = tmp_path / "model.safetensors"
    content = bytearray(model.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
        model.write_bytes(content)
    elif damage == "truncate":
        model.write_bytes(content[:-3])
    elif damage == "config":
        (tmp_path / "config.json").write_text("{")
    elif damage == "unfinished":
        (tmp_path / "model.sha256").unlink()
    else:
        model.unlink()
    name = {"config": "config.json", "unfinished": "model.sha256"}.get(damage, "model.safetensors")
    with pytest.raises(FrozenEncoderError, match=name):
        load_frozen(tmp_path)


def test_what_cannot_be_stored_is_refused(tmp_path):
    with pytest.raises(FrozenEncoderError, match="a/b"):
        save_frozen(tmp_path, {"a/b": np.zeros(1)}, {}, {})
    with pytest.raises(FrozenEncoderError, match="outer/x.*complex"):
        save_frozen(tmp_path, {"outer": {"x": np.zeros(1, np.complex64)}}, {}, {})
    with pytest.raises(FrozenEncoderError, match="no parameters"):
        save_frozen(tmp_path, {}, {}, {})
