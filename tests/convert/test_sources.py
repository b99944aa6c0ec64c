"""Reading published files; nothing in them may run."""

import json
import pickle

import numpy as np
import pytest
from safetensors.numpy import save_file

from opt_jax.convert import sources
from opt_jax.convert.sources import SourceFileError, read_arrays

ARRAYS = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.float16)}


class Canary:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (exec, (f"open({str(self.path)!r}, 'w').close()",))


def assert_read(path):
    found = read_arrays(path)
    assert set(found) == set(ARRAYS) and found["b"].dtype == np.float32
    np.testing.assert_array_equal(found["a.weight"], ARRAYS["a.weight"])


def test_safetensors_alone_in_a_folder_and_in_shards(tmp_path):
    save_file(ARRAYS, tmp_path / "model.safetensors")
    assert_read(tmp_path / "model.safetensors")
    assert_read(tmp_path)
    shards = tmp_path / "shards"
    shards.mkdir()
    for name, array in ARRAYS.items():
        save_file({name: array}, shards / f"{name}.safetensors")
    weight_map = {name: f"{name}.safetensors" for name in ARRAYS}
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_read(shards)
    weight_map["b"] = "../model.safetensors"
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(SourceFileError, match="not beside it"):
        read_arrays(shards)


def test_bfloat16_becomes_float32(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch

    tensors = {"x": torch.tensor([1.5, -2.0], dtype=torch.bfloat16)}
    save_torch(tensors, tmp_path / "model.safetensors")
    torch.save(tensors, tmp_path / "model.bin")
    for name in ("model.safetensors", "model.bin"):
        found = read_arrays(tmp_path / name)["x"]
        assert found.dtype == np.float32 and found.tolist() == [1.5, -2.0]


def test_float64_stays_float64(tmp_path):
    save_file({"x": np.array([1 + 2**-40])}, tmp_path / "model.safetensors")
    found = read_arrays(tmp_path)["x"]
    assert found.dtype == np.float64 and found.tolist() == [1 + 2**-40]


@pytest.mark.parametrize("wrapped", [False, True])
def test_torch_files_of_tensors(tmp_path, wrapped):
    torch = pytest.importorskip("torch")
    tensors = {name: torch.from_numpy(array) for name, array in ARRAYS.items()}
    torch.save({"model": tensors} if wrapped else tensors, tmp_path / "pytorch_model.bin")
    assert_read(tmp_path)


@pytest.mark.parametrize("protocol", [2, 4])
def test_pickles_of_arrays(tmp_path, protocol):
    (tmp_path / "m.pkl").write_bytes(pickle.dumps({"model": ARRAYS, "__author__": "x"}, protocol))
    assert_read(tmp_path / "m.pkl")


@pytest.mark.parametrize("name", ["m.pkl", "m.bin"])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, name):
    canary = tmp_path / "canary"
    (tmp_path / name).write_bytes(pickle.dumps({"model": {"x": Canary(canary)}}))
    with pytest.raises(SourceFileError, match=name if name == "m.bin" else "m.pkl names builtins.exec"):
        read_arrays(tmp_path / name)
    assert not canary.exists()


def test_a_pickle_changes_nothing_here(tmp_path):
    # BUILD with a pair of states sets attributes on whatever stands there, also on a function.
    state = b"(N" + pickle.dumps({"__defaults__": ("z",)}, 2)[2:-1] + b"tb."
    (tmp_path / "m.pkl").write_bytes(b"\x80\x02c_codecs\nencode\n" + state)
    with pytest.raises(SourceFileError, match="m.pkl is no pickle of arrays"):
        read_arrays(tmp_path / "m.pkl")
    assert sources._latin1.__defaults__ == ("latin1",)


def test_what_is_no_array_of_numbers_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    (tmp_path / "m.pkl").write_bytes(pickle.dumps({"x": np.array(["a", "b"])}))
    with pytest.raises(SourceFileError, match="m.pkl: x holds <U1, not numbers"):
        read_arrays(tmp_path / "m.pkl")
    torch.save({"x": torch.eye(3).to_sparse()}, tmp_path / "m.pt")
    with pytest.raises(SourceFileError, match="m.pt cannot be read"):
        read_arrays(tmp_path / "m.pt")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}')
    with pytest.raises(SourceFileError, match="index.json cannot be read"):
        read_arrays(tmp_path / "model.safetensors.index.json")


def test_a_saved_module_runs_nothing(tmp_path):
    torch = pytest.importorskip("torch")
    canary = tmp_path / "canary"
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    module.harmful = Canary(canary)
    torch.save(module, tmp_path / "m.pkl")
    found = read_arrays(tmp_path / "m.pkl")
    expected = module.state_dict()
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor.numpy())
    assert not canary.exists()


@pytest.mark.parametrize("name", ["m.safetensors", "m.bin", "m.pkl"])
def test_a_truncated_file_is_named(tmp_path, name):
    torch = pytest.importorskip("torch")
    path = tmp_path / name
    if name == "m.safetensors":
        save_file(ARRAYS, path)
    elif name == "m.bin":
        torch.save({"x": torch.ones(100)}, path)
    else:
        path.write_bytes(pickle.dumps(ARRAYS))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(SourceFileError, match=name):
        read_arrays(path)


def test_what_is_not_there(tmp_path):
    with pytest.raises(SourceFileError, match="none of model.safetensors"):
        read_arrays(tmp_path)
    with pytest.raises(SourceFileError, match="no such file"):
        read_arrays(tmp_path / "x.bin")
    (tmp_path / "x.h5").write_text("")
    with pytest.raises(SourceFileError, match="expected one of .safetensors"):
        read_arrays(tmp_path / "x.h5")
