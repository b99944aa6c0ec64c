"""What export and import refuse, in one line and leaving what is there as it was."""

import errno
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from opt_jax.convert import __main__ as command
from opt_jax.convert.export import found_in
from opt_jax.convert.opt_config import configuration
from opt_jax.convert.place import check_place, straight
from opt_jax.convert.shards import ExportError
from opt_jax.trained import WorkdirError

DECODER = {"num_layers": 1, "num_heads": 2, "mlp_size": 8}
CONFIG = {
    "model_type": "opt_jax",
    "hidden_size": 8,
    "num_layers": 2,
    "num_heads": 2,
    "mlp_size": 8,
    "pre_norm": True,
    "layer_norm_epsilon": 1e-6,
    "num_alignment_layers": 1,
    "alignment_size": 4,
    "frame_window": 5,
    "max_text_positions": 8,
    "max_audio_positions": 8,
    "vocab_size": 9,
    "region_size": 4,
    "audio_size": 4,
    "num_region_classes": 0,
    "num_codes": 1,
    "codes_per_image": 4,
    "text_decoder": DECODER,
    "image_decoder": None,
    "num_classes": 0,
}


@pytest.fixture
def exported(tmp_path):
    """A folder as an export leaves it, with hardly any weights."""
    folder = tmp_path / "exported"
    (folder / "wav2vec2").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file({"embedder.words.weight": np.zeros((9, 8), np.float32)}, folder / "model.safetensors")
    for name in ("README.md", "modeling_opt_jax.py", "wav2vec2/vocab.json", "wav2vec2/model.safetensors"):
        (folder / name).write_text("mine")
    return folder


def test_force_replaces_what_an_export_wrote_and_nothing_else(exported):
    check_place(exported, True)
    (exported / "notes.md").write_text("weeks of work")
    (exported / "runs").mkdir()
    (exported / "wav2vec2" / "optimizer.pt").write_text("weeks of work")
    with pytest.raises(ExportError, match="notes.md, runs, wav2vec2/optimizer.pt.*would delete"):
        check_place(exported, True)
    for name in ("notes.md", "wav2vec2/optimizer.pt"):
        (exported / name).unlink()
    (exported / "runs").rmdir()
    check_place(exported, True)
    (exported / "dvae").write_text("a file where a folder should be")
    with pytest.raises(ExportError, match=r"\(dvae\)"):
        check_place(exported, True)


def test_weights_tuned_in_pytorch_are_not_replaced(exported):
    (exported / "config.json").write_text(json.dumps(CONFIG | {"transformers_version": "5.0.0"}))
    with pytest.raises(ExportError, match="written by save_pretrained"):
        check_place(exported, True)


def test_a_checkpoint_is_found_by_whatever_path_leads_to_it(tmp_path):
    step = tmp_path / "run" / "checkpoints" / "pretrain" / "1700"
    step.mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(step)
    (step.parent / "latest").symlink_to("1700")
    for path in (step, tmp_path / "link", step / ".." / "1700", step.parent / "latest"):
        assert found_in(path) == (tmp_path / "run", "pretrain", 1700), path
    assert found_in(step / ".." / ".." / "..") == (tmp_path / "run", None, None)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.json").write_text("{}")
    (tmp_path / "elsewhere" / "checkpoints").symlink_to(step.parents[1])
    moved = tmp_path / "elsewhere" / "checkpoints" / "pretrain" / "1700"
    assert found_in(moved) == (tmp_path / "elsewhere", "pretrain", 1700)
    for path, told in ((step.parent, "step in it: .*1700"), (step.parents[1], "step in it: pretrain/1700")):
        with pytest.raises(WorkdirError, match=told):
            found_in(path)
    with pytest.raises(WorkdirError, match="no finished checkpoint"):
        found_in(step.with_name("1800"))
    assert straight(tmp_path / "new" / "..") == tmp_path
    assert straight(tmp_path / "link") == tmp_path / "link"


def import_error(folder, out):
    with pytest.raises(SystemExit) as end:
        command.main(["import", "--kind=opt", f"--source={folder}", f"--out={out}"])
    told = str(end.value.code)
    assert told.startswith("opt_jax: ") and "\n" not in told and not out.exists()
    return told


@pytest.mark.parametrize(
    "field, value, told",
    [
        ("num_layers", "four", 'num_layers is "four", expected a whole number from 1'),
        ("num_layers", True, "num_layers is true, expected a whole number"),
        ("num_layers", 10**9, "num_layers is 1000000000, expected a whole number from 1 to 10000000"),
        ("hidden_size", -5, "hidden_size is -5, expected"),
        ("hidden_size", 8.0, "hidden_size is 8.0, expected a whole number"),
        ("num_heads", 3, "num_heads is 3, expected a divisor of hidden_size, 8"),
        ("num_alignment_layers", 3, "num_alignment_layers is 3, expected at most num_layers, 2"),
        ("pre_norm", "yes", 'pre_norm is "yes", expected true or false'),
        ("layer_norm_epsilon", 0, "layer_norm_epsilon is 0, expected a number above 0"),
        ("text_decoder", [1], "text_decoder is .1., expected null or an object with num_layers"),
        ("text_decoder", DECODER | {"num_heads": 3}, "text_decoder.num_heads is 3, expected a divisor"),
        ("image_decoder", DECODER | {"mlp_size": None}, "image_decoder.mlp_size is null, expected a whole"),
    ],
)
def test_a_configuration_that_no_model_has_is_refused_by_its_field(field, value, told):
    configuration(CONFIG)
    with pytest.raises(ValueError, match=told):
        configuration(CONFIG | {field: value})


def test_damaged_folders_are_told_in_one_line(exported, tmp_path):
    config, out = exported / "config.json", tmp_path / "out"
    for content, told in (
        ("[]", "expected an object of fields, found list"),
        ("{", "cannot be read as JSON"),
        (json.dumps(CONFIG | {"num_layers": "four"}), 'num_layers is "four"'),
        (json.dumps(CONFIG | {"num_layers": 10**7}), "numbers, and the weights have 72"),
    ):
        config.write_text(content)
        assert told in import_error(exported, out)


def test_an_import_that_cannot_be_written_leaves_no_half_of_it(exported, tmp_path, monkeypatch):
    out, parameters = tmp_path / "new" / "back", {"a/b": np.zeros(2, np.float32)}
    monkeypatch.setitem(command.KINDS, "opt", lambda source: (parameters, {}))
    save = command.save_frozen

    def full(directory, *arguments):
        save(directory, *arguments)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(command, "save_frozen", full)
    assert f"{out} cannot be written: No space left" in import_error(exported, out)
    assert not list(out.parent.iterdir())
    monkeypatch.setattr(command, "save_frozen", save)
    command.main(["import", "--kind=opt", f"--source={exported}", f"--out={out}"])
    assert "model.safetensors" in {path.name for path in out.iterdir()}
