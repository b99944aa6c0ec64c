"""The command: from a working directory to a folder for PyTorch, and back."""

import inspect
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_pipeline import smallest_config
from tiny_cache import SCHEMA, TinyExtractor, TinySource

from opt_jax.cache import build_cache
from opt_jax.checkpoints import Checkpoints, parameters_digest
from opt_jax.configuration import load
from opt_jax.convert import opt as conversion
from opt_jax.convert.__main__ import main
from opt_jax.convert.card_usage import usage
from opt_jax.convert.export import load as load_checkpoint
from opt_jax.convert.export import write_folder
from opt_jax.convert.place import beside
from opt_jax.convert.shards import ExportError
from opt_jax.encoders.frozen import load_frozen
from opt_jax.encoders.tokenizer import train_tokenizer
from opt_jax.export import MODELING_FILES, PROCESSING_FILES
from opt_jax.models.opt import OPT
from opt_jax.partitioning import make_mesh, parameter_shardings, path_name, unbox
from opt_jax.pipeline import build_model
from opt_jax.tasks.classification import class_logits
from opt_jax.trained import load_trained

ROOT = Path(__file__).parents[2]
STEP = 3
FILES = {
    "README.md",
    "checksums.sha256",
    "config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    *MODELING_FILES,
    *PROCESSING_FILES,
}


def drawn(tree, seed):
    """Float32 parameters, biases and norms drawn too."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        values = rng.normal(scale=0.3, size=leaf.shape) + path_name(path).endswith("scale")
        return jnp.asarray(values, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, tree)


def save(directory, params):
    checkpoints = Checkpoints(directory, 1, {})
    checkpoints.save(STEP, {"params": params}, {})
    checkpoints.close()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """The directory of a pre-training on eight devices, without it: ready regions, no recordings."""
    workdir = tmp_path_factory.mktemp("runs") / "pretrained"
    captions = [TinySource()[row].caption for row in range(10)]
    tokenizer = train_tokenizer(captions, 120, workdir / "encoders" / "tokenizer")
    extractor = {"detector": [4, 4], "wav2vec2": "none", "dvae": "none", "max_seconds": 3.0}
    features = workdir / "cache" / "train" / "features"
    fingerprint = {"source": {"seed": 0}, "extractor": extractor}
    build_cache(
        TinySource(),
        TinyExtractor(),
        features,
        fingerprint,
        split="train",
        schema=SCHEMA,
        examples_per_shard=10,
    )
    config = smallest_config(workdir)
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    cache = SimpleNamespace(schema=SCHEMA, **dict.fromkeys(("region_mean", "audio_mean"), np.zeros(4)))
    cache.region_deviation = cache.audio_deviation = np.ones(4)
    network, _ = build_model(config, cache, tokenizer, 1)
    init = lambda: network.init(jax.random.key(0), *conversion.smallest_batch(network.sizes))  # noqa: E731
    boxed = jax.eval_shape(init)["params"]
    places = parameter_shardings(make_mesh(dict(data=2, fsdp=2, tensor=2)), boxed)
    save(workdir / "checkpoints" / "pretrain", jax.device_put(drawn(unbox(boxed), 0), places))
    return workdir


@pytest.fixture(scope="module")
def tuned(workdir):
    """The directory of a fine-tuning of it, for classification."""
    config = load(ROOT / "configs" / "finetune" / "classification.py")
    config.pretrained, config.workdir = str(workdir), str(workdir.parent / "tuned")
    params = load_trained(workdir).model.params
    width = params["embedder"]["words"].shape[1]
    classes = {"kernel": jnp.zeros((4 * width, 3)), "bias": jnp.zeros(3)}
    save(workdir.parent / "tuned" / "checkpoints" / "finetune", drawn({"opt": params, "classes": classes}, 1))
    (workdir.parent / "tuned" / "config.json").write_text(json.dumps(config.to_dict()))
    return workdir.parent / "tuned"


@pytest.fixture(scope="module")
def folder(workdir, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "opt-tiny"
    main(["export", f"--checkpoint={workdir}", f"--out={out}"])
    return out


def test_config_and_files_are_what_the_model_there_asks_for(folder):
    pytest.importorskip("torch")
    from opt_jax.export.configuration_opt_jax import OptJaxConfig

    assert {path.name for path in folder.iterdir()} == FILES
    written = json.loads((folder / "config.json").read_text())
    asked = set(inspect.signature(OptJaxConfig.__init__).parameters) - {"self", "kwargs"}
    assert set(written) - asked == {"model_type", "architectures", "auto_map", "dtype"}
    assert not asked - set(written)
    read = OptJaxConfig.from_pretrained(folder)
    assert read.num_hidden_layers == read.num_layers == written["num_layers"]
    assert read.text_decoder == written["text_decoder"]


def params_of(source, tmp_path):
    main(["import", "--kind=opt", f"--source={source}", f"--out={tmp_path / 'back'}"])
    params, config = load_frozen(tmp_path / "back")
    shutil.rmtree(tmp_path / "back")
    return params, config


def test_a_step_goes_out_and_comes_back_bit_by_bit(workdir, tmp_path):
    place = workdir / "checkpoints" / "pretrain" / str(STEP)
    main(["export", f"--checkpoint={place}", f"--out={tmp_path / 'out'}"])
    back, config = params_of(tmp_path / "out", tmp_path)
    jax.tree.map(np.testing.assert_array_equal, back, load_trained(workdir).model.params)
    assert config["standardised"] and config["hidden_size"] == 32


def test_large_weights_are_in_several_files(workdir, tmp_path):
    torch = pytest.importorskip("torch")
    from opt_jax.export.modeling_opt_jax import OptJaxModel

    exported = load_checkpoint(workdir)
    write_folder(exported, tmp_path / "out", limit=100_000)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((tmp_path / "out" / name).stat().st_size < 110_000 for name in files)
    back, _ = params_of(tmp_path / "out", tmp_path)
    jax.tree.map(np.testing.assert_array_equal, back, exported.params)
    model = OptJaxModel.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(
        model.embedder.words.weight.detach(), torch.tensor(np.asarray(exported.params["embedder"]["words"]))
    )


def test_without_decoders_and_in_half_the_bytes(workdir, folder, tmp_path):
    torch = pytest.importorskip("torch")
    from opt_jax.export.modeling_opt_jax import OptJaxModel

    flags = ["--only=encoder", "--dtype=bfloat16"]
    main(["export", f"--checkpoint={workdir}", f"--out={tmp_path / 'out'}", *flags])
    size, whole = (
        path.stat().st_size for path in (p / "model.safetensors" for p in (tmp_path / "out", folder))
    )
    assert size < 0.5 * whole
    model = OptJaxModel.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16 and model.text_decoder is None
    with torch.no_grad():
        output = model(input_ids=torch.tensor([[2, 7, 8]]))
    assert output.matching_logits.isfinite().all()
    with pytest.raises(ValueError, match="without its text decoder"):
        model.generate_text(output)
    back, _ = params_of(tmp_path / "out", tmp_path)
    params = load_trained(workdir).model.params
    assert set(back) == set(params) - {"text_decoder", "image_decoder"}
    words = np.asarray(params["embedder"]["words"].astype(jnp.bfloat16), np.float32)
    np.testing.assert_array_equal(back["embedder"]["words"], words)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_the_dtype_is_that_of_the_flag(workdir, dtype, tmp_path):
    torch = pytest.importorskip("torch")
    from opt_jax.export.modeling_opt_jax import OptJaxModel

    main(["export", f"--checkpoint={workdir}", f"--out={tmp_path / 'out'}", f"--dtype={dtype}"])
    assert f"weights in {dtype}." in (tmp_path / "out" / "README.md").read_text()
    model = OptJaxModel.from_pretrained(tmp_path / "out")
    assert {str(parameter.dtype) for parameter in model.parameters()} == {f"torch.{dtype}"}
    params = load_trained(workdir).model.params
    with torch.no_grad():
        output = model(input_ids=torch.tensor([[2, 7, 8]]))
        ids, _ = model.generate_text(output, max_length=3)
    assert output.last_hidden_state.isfinite().all() and ids.shape == (1, 3)
    words = model.embedder.words.weight.detach().numpy()
    np.testing.assert_array_equal(words, np.asarray(params["embedder"]["words"]).astype(dtype))
    back, _ = params_of(tmp_path / "out", tmp_path)
    wide = "float64" if dtype == "float64" else "float32"
    assert {leaf.dtype.name for leaf in jax.tree.leaves(back)} == {wide}


def test_numbers_that_float16_has_not_are_refused(workdir, tmp_path):
    exported = load_checkpoint(workdir)
    exported.params["heads"]["word_bias"] = exported.params["heads"]["word_bias"].at[0].set(1e5)
    with pytest.raises(ExportError, match="heads.word_bias has numbers beyond float16"):
        write_folder(exported, tmp_path / "out", dtype="float16")
    assert not list(tmp_path.iterdir())


def test_a_fine_tuned_classifier_is_exported_with_its_classes(tuned, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    from opt_jax.export.modeling_opt_jax import OptJaxModel

    main(["export", f"--checkpoint={tuned}", f"--out={tmp_path / 'out'}"])
    exported, model = load_checkpoint(tuned), OptJaxModel.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {0: "circle", 1: "square", 2: "star"}
    ids = torch.tensor([[2, 7, 9, 3]])
    with torch.no_grad():
        output = model(input_ids=ids)
    memory, valid = output.last_hidden_state.numpy(), output.attention_mask.numpy()
    expected = class_logits(exported.classes, jnp.asarray(memory), jnp.asarray(valid), (4, 0, 0))
    np.testing.assert_allclose(output.logits, expected, rtol=0, atol=1e-5)
    lines = usage(exported.preparation, "all")  # of the card
    exec("\n".join(lines), {"model": model, "processor": lambda **_: {"input_ids": ids}})
    name, probability = capsys.readouterr().out.split()[-2:]
    best = output.logits[0].argmax().item()
    assert name == model.config.id2label[best] and 0 < float(probability) < 1
    back, _ = params_of(tmp_path / "out", tmp_path)
    jax.tree.map(np.testing.assert_array_equal, back.pop("classes"), dict(exported.classes))
    jax.tree.map(np.testing.assert_array_equal, back, exported.params)


def refused(*flags):
    with pytest.raises(SystemExit) as end:
        main(["export", *(str(flag) for flag in flags)])
    told = str(end.value.code)
    assert told.startswith("opt_jax: ") and "\n" not in told
    return told


def test_what_is_there_stays_unless_it_is_an_export_and_forced(workdir, tmp_path, folder):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years")
    flags = [f"--checkpoint={workdir}", f"--out={mine}"]
    assert "exists; name a folder" in refused(*flags)
    assert "is no exported model" in refused(*flags, "--force")
    (mine / "config.json").write_text('{"model_type": "bert"}')
    assert "is no exported model" in refused(*flags, "--force")
    assert (mine / "thesis.txt").read_text() == "years"
    older = tmp_path / "older"
    main(["export", flags[0], f"--out={older}", "--dtype=bfloat16"])
    assert "exists; name a folder" in refused(flags[0], f"--out={older}")
    main(["export", flags[0], f"--out={older}", "--force"])
    assert (older / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    (older / "model.safetensors").write_bytes(b"tuned")
    assert "(model.safetensors); --force would delete it" in refused(flags[0], f"--out={older}", "--force")
    assert (older / "model.safetensors").read_bytes() == b"tuned"
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "older"}


def test_an_export_that_breaks_off_leaves_what_was_there(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt), beside(out) as aside:
        (aside / "a").write_text("new")
        raise KeyboardInterrupt
    assert (out / "a").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_too_little_disk_is_told_before_anything_is_written(workdir, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**7))
    told = refused(f"--checkpoint={workdir}", f"--out={tmp_path / 'new' / 'out'}")
    assert f"{tmp_path} has 0.01 GB free, the export takes 0.01 GB" in told
    assert not list(tmp_path.iterdir())


def test_the_card_has_the_figures_of_the_step_that_was_evaluated(workdir, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    (copy / "results.json").write_text(json.dumps({"captioning/image/CIDEr": 12.345}))
    (copy / "evaluation").mkdir()
    params, record = load_trained(workdir).model.params, copy / "evaluation" / "stage.json"
    for digest, told in ((parameters_digest(params), "12.35"), ("another", "Step 3 was not evaluated")):
        record.write_text(json.dumps({"inputs": {"parameters": digest}, "outputs": {}, "seconds": 1.0}))
        main(["export", f"--checkpoint={copy}", f"--out={tmp_path / digest[:7]}"])
        card = (tmp_path / digest[:7] / "README.md").read_text(encoding="utf-8")
        assert told in card and "after step 3." in card and ("12.35" in card) == (told == "12.35")


def test_damaged_results_are_told_before_anything_is_written(workdir, tmp_path):
    path = workdir / "results.json"
    path.write_text("{")
    try:
        told = refused(f"--checkpoint={workdir}", f"--out={tmp_path / 'out'}")
    finally:
        path.unlink()
    assert f"{path} is damaged" in told and not list(tmp_path.iterdir())


def test_checkpoints_that_are_unfinished_damaged_or_foreign_are_refused(workdir, tmp_path, folder):
    out = tmp_path / "out"
    shutil.copytree(folder, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def told(checkpoint):
        message = refused(f"--checkpoint={checkpoint}", f"--out={out}", "--force")
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
        return message

    assert "holds no config.json" in told(tmp_path / "nowhere")
    assert "is not that of a training" in told(folder)
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    steps = copy / "checkpoints" / "pretrain"
    assert "is no finished checkpoint" in told(steps / "7")
    unfinished = steps / "8.orbax-checkpoint-tmp"  # as Orbax calls a step until it is whole
    shutil.copytree(steps / str(STEP), unfinished)
    for file in [path for path in sorted(unfinished.rglob("*")) if path.is_file()][::2]:
        file.unlink()
    assert f"{unfinished} is no finished checkpoint" in told(unfinished)
    main(["export", f"--checkpoint={copy}", f"--out={tmp_path / 'last'}"])  # the last that is finished
    assert "after step 3." in (tmp_path / "last" / "README.md").read_text()
    half = unfinished.rename(steps / "8")  # as a copy that broke off leaves it
    for place in (half, copy):
        assert f"{half}: cannot be read" in told(place)
    shutil.rmtree(half)
    backup = shutil.copytree(steps, steps.with_name("pretrain_backup"))
    assert "is of no pretrain; name a step in checkpoints/pretrain" in told(backup / str(STEP))
    shutil.rmtree(backup)
    files = [path for path in (copy / "checkpoints").rglob("*") if path.is_file()]
    # Several, as the largest may hold what is not read any more.
    for path in sorted(files, key=lambda path: path.stat().st_size)[-3:]:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    assert str(copy / "checkpoints" / "pretrain" / str(STEP)) in told(copy)
    shutil.rmtree(copy / "checkpoints")
    assert "no checkpoint" in told(copy)


@pytest.mark.parametrize(
    "content, lacking",
    [
        ([], "cache, data, encoders, evaluation, loader, model"),
        (3, "cache, data, encoders, evaluation, loader, model"),
        ({"encoders": {}}, "cache, data, evaluation, loader, model"),
        ({"task": "captioning", "data": 3}, "data, evaluation, inputs, precision, pretrained"),
    ],
)
def test_a_configuration_of_something_else_is_told_in_one_line(content, lacking, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(content))
    told = refused(f"--checkpoint={tmp_path}", f"--out={tmp_path / 'out'}")
    assert f"config.json is not that of a training: it has no {lacking}" in told
    assert "name the --workdir of one" in told


def test_parameters_of_another_network_are_refused(workdir, tmp_path):
    exported = load_checkpoint(workdir)
    config = dict(exported.network.config) | {"mlp_size": 48}
    other = OPT(config, exported.network.sizes)
    with pytest.raises(ValueError, match="encoder/layers/mlp_in/bias"):
        write_folder(SimpleNamespace(**vars(exported) | {"network": other}), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_of_another_model_is_not_imported(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "in")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "in" / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    with pytest.raises(SystemExit, match="model_type is 'bert', expected 'opt_jax'"):
        main(["import", "--kind=opt", f"--source={tmp_path / 'in'}", f"--out={tmp_path / 'out'}"])
    (tmp_path / "in" / "config.json").write_text(json.dumps(config | {"mlp_size": 48}))
    with pytest.raises(SystemExit, match="cannot become part of"):
        main(["import", "--kind=opt", f"--source={tmp_path / 'in'}", f"--out={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()
