"""What export and import refuse, in one line and leaving what is there as it was."""

import errno
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from frozen_toy import toy_dvae
from safetensors.numpy import load_file, save_file

from opt_jax.convert import __main__ as command
from opt_jax.convert.export import found_in
from opt_jax.convert.frozen import frozen as exported_encoder
from opt_jax.convert.opt_config import configuration
from opt_jax.convert.place import CHECKSUMS, check_place, straight, write_checksums
from opt_jax.convert.shards import ExportError
from opt_jax.encoders import frozen
from opt_jax.trained import WorkdirError

ROOT = Path(__file__).parents[2]
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
    write_checksums(folder)
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
    (exported / "modeling_opt_jax.py").unlink()
    check_place(exported, True)
    (exported / "modeling_opt_jax.py").symlink_to(ROOT / "README.md")
    with pytest.raises(ExportError, match=r"\(modeling_opt_jax.py\)"):
        check_place(exported, True)


def test_the_checksums_are_those_that_sha256sum_reads(exported):
    done = subprocess.run(["sha256sum", "--check", "--strict", CHECKSUMS], cwd=exported, capture_output=True)
    assert done.returncode == 0 and done.stdout.count(b": OK") == 6, done.stderr


@pytest.mark.parametrize("name", ["README.md", "config.json", "model.safetensors", "wav2vec2/vocab.json"])
def test_what_was_written_since_is_not_replaced(exported, name):
    """As by hand, or by safetensors: of the same size too."""
    content = (exported / name).read_bytes()
    (exported / name).write_bytes(content.swapcase() if name != "config.json" else content + b" ")
    with pytest.raises(ExportError, match=rf"\({name}\); --force would delete it"):
        check_place(exported, True)


def test_what_save_pretrained_wrote_is_not_replaced(exported):
    (exported / CHECKSUMS).unlink()
    with pytest.raises(ExportError, match="has no checksums.sha256, as save_pretrained writes none"):
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


def test_an_encoder_of_several_dtypes_keeps_each_and_one_of_integers_is_refused(tmp_path):
    params, config = toy_dvae()
    params["encoder"]["output"]["bias"] = params["encoder"]["output"]["bias"].astype(np.float64)
    params["decoder"]["output"]["kernel"] = params["decoder"]["output"]["kernel"].astype(np.float16)
    frozen.save_frozen(tmp_path / "here", params, config, {})
    exported_encoder("dvae", tmp_path / "here").write(tmp_path / "dvae", 10**9)
    arrays = load_file(tmp_path / "dvae" / "model.safetensors")
    assert arrays["encoder.output.bias"].dtype == np.float64
    assert arrays["decoder.output.weight"].dtype == np.float16
    assert arrays["encoder.output.weight"].dtype == np.float32
    params["encoder"]["output"]["bias"] = np.zeros(11, np.int32)
    frozen.save_frozen(tmp_path / "here", params, config, {})
    with pytest.raises(ExportError, match=r"no floats: encoder/output/bias \(I32\); make the encoder again"):
        exported_encoder("dvae", tmp_path / "here")


STOPPED = """
import runpy, sys, time
from opt_jax.encoders import frozen

def half(directory, *_):
    (directory / "model.safetensors").write_text("half")
    print("writing", flush=True)
    time.sleep(60)

frozen.save_frozen = half
runpy.run_module("opt_jax.convert", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_who_stops_it_finds_nothing_half_written(number, code, tmp_path):
    frozen.save_frozen(tmp_path / "here", *toy_dvae(), {})
    exported_encoder("dvae", tmp_path / "here").write(tmp_path / "dvae", 10**9)
    flags = ["import", "--kind=dvae", f"--source={tmp_path / 'dvae'}", f"--out={tmp_path / 'new' / 'back'}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    program = subprocess.Popen([sys.executable, "-c", STOPPED, *flags], **pipes)
    assert program.stdout.readline() == "writing\n"
    assert len(list((tmp_path / "new").iterdir())) == 1
    program.send_signal(number)
    _, told = program.communicate(timeout=120)
    assert program.returncode == code and told == "opt_jax: stopped; nothing is left that is half written\n"
    assert not list((tmp_path / "new").iterdir())
