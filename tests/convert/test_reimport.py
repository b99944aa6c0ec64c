"""The README's way from an exported folder into a pre-training on other data, at the smallest sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
from PIL import Image

from opt_jax.convert.__main__ import main
from opt_jax.data.spoken_scenes import SpokenScenes

ROOT = Path(__file__).parents[2]
# As in the README, where `tiny` stands for this configuration.
FLAGS = [
    "--config.data.source=manifest",
    "--config.data.manifest=data/mine",
    "--workdir=runs/mine",
    "--config.initial_parameters=opt-back",
    "--config.encoders.tokenizer.kind=pretrained",
    "--config.encoders.tokenizer.name=opt-tiny",
    "--config.encoders.detector.pretrained=detector-back",
    "--config.encoders.wav2vec2.pretrained=wav2vec2-back",
    "--config.encoders.dvae.pretrained=dvae-back",
]
CONFIG = """
from test_pipeline import smallest_config

def get_config():
    return smallest_config("")
"""


def write_data(scenes: Path, out: Path) -> None:
    """Spoken Scenes as files that a manifest lists."""
    out.mkdir(parents=True)
    for split in ("train", "validation", "test"):
        lines, source = [], SpokenScenes(scenes, split)
        for row in range(len(source)):
            sample, name = source[row], f"{split}{row}"
            Image.fromarray(sample.image).save(out / f"{name}.png")
            soundfile.write(out / f"{name}.flac", sample.audio, 16_000)
            labels = [source.class_names[label] for label in sample.labels]
            row = {"id": name, "caption": sample.caption, "labels": labels}
            lines.append(json.dumps(row | {"image": f"{name}.png", "audio": f"{name}.flac"}))
        (out / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


@pytest.mark.slow
def test_an_exported_folder_starts_a_pre_training_on_other_data(pretrained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_data(pretrained / "data", tmp_path / "data" / "mine")
    main(["export", f"--checkpoint={pretrained}", "--out=opt-tiny"])
    main(["import", "--kind=opt", "--source=opt-tiny", "--out=opt-back"])
    for name, kind in (("detector", "faster_rcnn"), ("wav2vec2", "wav2vec2"), ("dvae", "dvae")):
        main(["import", f"--kind={kind}", f"--source=opt-tiny/{name}", f"--out={name}-back"])
    (tmp_path / "smallest.py").write_text(CONFIG)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "XLA_FLAGS": ""}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    command = [sys.executable, "-m", "opt_jax.main", "--config=smallest.py", *FLAGS]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    (told,) = [line for line in done.stdout.splitlines() if "parameters start from" in line]
    every = told.split()[1]
    assert told == f"pretrain: {every} of {every} parameters start from the {every} given"
    results = json.loads((tmp_path / "runs" / "mine" / "results.json").read_text())
    assert results["triplets/train"] == 32 and "captioning/image/CIDEr" in results
