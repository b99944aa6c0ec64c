"""`python -m opt_jax.cache.build` from a list of files to a cache, and the benchmark of reading one."""

import json
import os
import pickle
import subprocess
import sys

import jax
import numpy as np
import pytest
import soundfile
from PIL import Image

from configs.encoders import dvae, wav2vec2
from opt_jax.benchmark import cache_reading
from opt_jax.cache import FeatureCache
from opt_jax.cache.build import main, parse
from opt_jax.cache.extraction import EXTRACTION_VERSION, Extraction
from opt_jax.data.sources import open_split
from opt_jax.encoders.dvae import DiscreteVAE
from opt_jax.encoders.frozen import save_frozen
from opt_jax.encoders.tokenizer import load_tokenizer, train_tokenizer
from opt_jax.encoders.wav2vec2 import Wav2Vec2
from opt_jax.partitioning import unbox


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six rows of pictures, words and sounds, one of them broken; small encoders with random weights."""
    folder = tmp_path_factory.mktemp("build_command")
    draw = np.random.default_rng(0)
    rows = []
    for number in range(6):
        Image.fromarray(draw.integers(0, 256, (40, 50, 3), np.uint8)).save(folder / f"{number}.png")
        soundfile.write(folder / f"{number}.wav", draw.normal(0, 0.1, 3000 + 500 * number), 16000)
        rows.append(dict(id=f"n{number}", image=f"{number}.png", caption="a red ball", audio=f"{number}.wav"))
    (folder / "3.png").write_bytes(b"no picture")
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = dvae.get_config("tiny").model.to_dict() | dict(vocab_size=5, n_hid=4, n_init=4)
    network = DiscreteVAE(**sizes)
    pixels, codes = np.zeros((1, 64, 64, 3), np.float32), np.zeros((1, 8, 8, 5), np.float32)
    params = jax.jit(lambda: network.init(jax.random.key(2), pixels, method="logits"))()["params"]
    params |= jax.jit(lambda: network.init(jax.random.key(2), codes, method="reconstruct"))()["params"]
    save_frozen(folder / "dvae", params, sizes | dict(image_size=64, code_grid=[8, 8]), {})
    speech = wav2vec2.get_config("tiny").model
    speech.update(conv_dim=(4,) * 7, hidden_size=8, num_layers=1, num_heads=2, intermediate_size=8)
    speech.update(position_kernel=4, position_groups=2)
    clip = np.zeros((1, 400), np.float32), np.array([400])
    params = unbox(jax.jit(Wav2Vec2(speech).init)(jax.random.key(1), *clip)["params"])
    save_frozen(folder / "wav2vec2", {"wav2vec2": params}, speech, {})
    train_tokenizer(["a red ball", "a blue box"], 100, folder / "words")
    return folder


def command(folder, out, *more) -> list[str]:
    places = dict(source="", wav2vec2="wav2vec2", dvae="dvae", tokenizer="words", out=out)
    flags = [f"--{name}={folder / place}" for name, place in places.items()]
    return [*flags, "--examples_per_shard=2", *more]


def test_from_files_to_a_cache(folder, capsys):
    assert main(command(folder, "one", "--max_seconds=0.25", "--verify")) == 0
    printed = capsys.readouterr().out
    assert "5 rows in 3 shards; set aside: 1 (" in printed and "no damage found" in printed
    (line,) = map(json.loads, (folder / "one" / "quarantine.jsonl").read_text().splitlines())
    assert (line["row"], line["id"], line["source"], line["stage"]) == (3, "n3", "manifest", "reading")
    cache = FeatureCache(folder / "one")
    assert list(cache.ids) == ["n0", "n1", "n2", "n4", "n5"]
    assert cache.frame_counts.tolist() == [9, 10, 12, 12, 12]
    fingerprint = cache.manifest.fingerprint
    assert fingerprint["code_version"] == EXTRACTION_VERSION
    assert fingerprint["extractor"]["max_seconds"] == 0.25
    # Another list, of the same number of rows, is another cache.
    content = (folder / "train.jsonl").read_text()
    (folder / "train.jsonl").write_text(content.replace("ball", "book", 1))
    with pytest.raises(SystemExit, match="2"):
        main(command(folder, "one", "--max_seconds=0.25"))
    assert "source.sha256" in capsys.readouterr().err
    (folder / "train.jsonl").write_text(content)
    (folder / "one" / "rows.npz").write_bytes(b"damaged")
    assert main(command(folder, "one", "--max_seconds=0.25", "--verify")) == 1


@pytest.mark.slow
@pytest.mark.parametrize("way", ["--processes=2", "--runner=DirectRunner"])
def test_other_ways_make_the_same_bytes(folder, way):
    if "runner" in way:
        pytest.importorskip("apache_beam")
    assert main(command(folder, "here")) == 0
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    arguments = [sys.executable, "-m", "opt_jax.cache.build", *command(folder, way, way)]
    done = subprocess.run(arguments, check=True, env=environment, capture_output=True, text=True)
    assert "RuntimeWarning" not in done.stderr
    for path in (folder / "here").iterdir():
        assert path.read_bytes() == (folder / way / path.name).read_bytes(), path.name


def test_extraction_is_small_as_a_pickle(folder):
    words = load_tokenizer(folder / "words")
    extraction = Extraction(None, None, folder / "dvae", words, 1.0, "bfloat16")
    source = open_split(str(folder), "train")
    expected = extraction.extract([source.read(0, audio=False)])
    content = pickle.dumps(extraction)
    assert len(content) < 20_000
    (found,) = pickle.loads(content).extract([source.read(0, audio=False)])
    for name, value in expected[0].items():
        np.testing.assert_array_equal(found[name], value)
    assert pickle.loads(content).schema() == extraction.schema()
    assert extraction.schema().num_codes == 64 and extraction.schema().feature_dtype == "bfloat16"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--threads=3"], "unknown: --threads=3"),
        (["--runner=DirectRunner", "--processes=2"], "--processes is for this machine alone"),
        (["--processes=0"], "at least 1"),
        (["--max_seconds=0"], "--max_seconds is at least 0.025"),
        (["--ready", "0", "7"], "--ready: the width"),
    ],
)
def test_flags_that_do_not_fit_are_refused(folder, capsys, flags, message):
    with pytest.raises(SystemExit):
        main(command(folder, "none", *flags))
    assert message in capsys.readouterr().err


def test_beam_gets_the_flags_that_are_not_known_here(folder):
    _, options = parse(command(folder, "none", "--runner=DataflowRunner", "--region=west"))
    assert options == ["--runner=DataflowRunner", "--region=west"]
    assert parse(command(folder, "none"))[1] is None


def test_missing_things_are_one_line(folder, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*command(folder, "none"), f"--dvae={folder / 'nowhere'}"])
    assert capsys.readouterr().err.startswith(f"opt_jax: {folder / 'nowhere'}")
    with pytest.raises(SystemExit, match="2"):
        main([*command(folder, "none"), f"--dvae={folder / 'wav2vec2'}"])
    assert capsys.readouterr().err.startswith("opt_jax: what was given as the dvae is none")
    for flag, part in (("wav2vec2", "audio"), ("dvae", "image")):
        flags = [argument for argument in command(folder, "none") if not argument.startswith(f"--{flag}=")]
        with pytest.raises(SystemExit, match="2"):
            main(flags)
        assert f"has rows with {part}; name the encoder for them: --{flag}=" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(command(folder, "none", "--ready", "8", "5"))
    assert "rows have pictures without ready regions" in capsys.readouterr().err
    assert not (folder / "none").exists()
    with pytest.raises(SystemExit, match="2"):
        main(command(folder, "train.jsonl"))
    assert "train.jsonl cannot be made a folder: File exists" in capsys.readouterr().err


def test_the_benchmark_of_reading(capsys):
    sizes = "--rows=12 --regions=3 --region_size=8 --frames=10 --audio_size=4 --codes=4 --batch=4"
    medians = cache_reading.main(cache_reading.parse([*sizes.split(), "--repetitions=2"]))
    assert len(medians) == 3 and min(medians.values()) > 0
    printed = capsys.readouterr().out
    assert "12 rows of" in printed and "share of the rate" in printed and "batches/s of 4 rows" in printed
