"""`base` at its real sizes, with frozen encoders of the published ones: what an export takes."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from ml_collections import ConfigDict
from safetensors import safe_open
from tiny_cache import TinySource

from configs.encoders import dvae as dvae_config
from configs.encoders import wav2vec2 as wav2vec2_config
from opt_jax.cache import FeatureCache, Schema, build_cache
from opt_jax.checkpoints import Checkpoints
from opt_jax.configuration import load
from opt_jax.convert import dvae, faster_rcnn, wav2vec2
from opt_jax.convert import opt as conversion
from opt_jax.convert.table import shapes_of
from opt_jax.encoders.frozen import digest, save_frozen
from opt_jax.encoders.resnet import STAGE_SIZES
from opt_jax.encoders.tokenizer import SPECIAL_TOKENS, load_tokenizer
from opt_jax.pipeline import build_model

ROOT = Path(__file__).parents[2]
SCHEMA = Schema(region_size=2048, region_classes=1601, audio_size=768, num_codes=64, cls_id=2)
MOST_SECONDS, MOST_MEMORY = 60, 4 << 20  # KiB
PROGRAM = """
import sys, time
from opt_jax.convert.__main__ import main
main(sys.argv[1:])
(peak,) = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(peak, time.process_time())
"""


class RandomFeatures:
    """Features of the published encoders' sizes for the rows of a `TinySource`."""

    def extract(self, triplets):
        rng = np.random.default_rng(0)
        rows = []
        for triplet in triplets:
            row = {"text_ids": [2, 9, 3]} if triplet.caption is not None else {}
            if triplet.image is not None:
                row["region_features"] = rng.normal(size=(36, 2048)).astype(np.float32)
                row["region_boxes"] = rng.uniform(size=(36, 7)).astype(np.float32)
                row |= {"region_classes": np.full(36, 7), "region_scores": np.full(36, 0.5)}
                row["image_codes"] = np.arange(64)
            if triplet.audio is not None:
                row["audio_features"] = rng.normal(size=(50, 768)).astype(np.float32)
            rows.append(row)
        return rows


def drawn(shapes, seed: int) -> dict:
    """Float32 parameters of these shapes by path."""
    rng = np.random.default_rng(seed)
    flat = {path: rng.standard_normal(shape, np.float32) * np.float32(0.02) for path, shape in shapes.items()}
    return unflatten_dict(flat, sep="/")


def published_encoders(directory: Path) -> dict[str, str]:
    """Frozen encoders of the published sizes with random weights; their hashes."""
    speech = wav2vec2_config.get_config("base")
    pictures = dvae_config.get_config("published").model.to_dict()
    pictures = ConfigDict(pictures | dict(image_size=64, code_grid=(8, 8)))
    detector = faster_rcnn.published(STAGE_SIZES[101])
    kinds = {
        "detector": (faster_rcnn.shapes(detector), detector),
        "wav2vec2": (wav2vec2.shapes(speech, ["lm_head.weight"]), speech.model),
        "dvae": (dvae.shapes(pictures), pictures),
    }
    for seed, (name, (shapes, config)) in enumerate(kinds.items()):
        save_frozen(directory / name, drawn(shapes, seed), config, {})
    return {name: digest(directory / name) for name in kinds}


def base_workdir(workdir: Path) -> None:
    """The directory of a pre-training of `base`, without the training."""
    used = published_encoders(workdir / "encoders") | {"max_seconds": 30.72}
    words = workdir / "words"
    words.mkdir()
    pieces = [*SPECIAL_TOKENS, *(f"w{number}" for number in range(30_522 - len(SPECIAL_TOKENS)))]
    (words / "vocab.txt").write_text("\n".join(pieces) + "\n")
    config, tokenizer = load(ROOT / "configs" / "pretrain.py", "base"), load_tokenizer(words)
    config.workdir = str(workdir)
    config.encoders.tokenizer.update(kind="pretrained", name=str(words))
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    features = workdir / "cache" / "train" / "features"
    fingerprint = {"source": {"seed": 0}, "extractor": used}
    options = {"split": "train", "schema": SCHEMA, "examples_per_shard": 10}
    build_cache(TinySource(), RandomFeatures(), features, fingerprint, **options)
    network, _ = build_model(config, FeatureCache(features), tokenizer, 8192)
    init = lambda: network.init(jax.random.key(0), *conversion.smallest_batch(network.sizes))  # noqa: E731
    checkpoints = Checkpoints(workdir / "checkpoints" / "pretrain", 1, {})
    params = drawn(shapes_of(jax.eval_shape(init)["params"]), 3)
    checkpoints.save(1, {"params": jax.device_put(params)}, {})
    checkpoints.close()


def numbers(path: Path) -> int:
    """In a file of weights."""
    with safe_open(path, framework="numpy") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())


@pytest.mark.slow
def test_base_is_exported_in_a_minute_and_four_gibibytes(tmp_path):
    base_workdir(tmp_path / "base")
    flags = ["export", f"--checkpoint={tmp_path / 'base'}", f"--out={tmp_path / 'out'}"]
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    start = time.monotonic()
    command = [sys.executable, "-c", PROGRAM, *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    seconds = time.monotonic() - start
    assert done.returncode == 0, done.stderr
    peak, busy = (float(number) for number in done.stdout.split()[-2:])
    folder = tmp_path / "out"
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    told = f"{seconds:.1f} s ({busy:.1f} s of processors), {peak / 2**20:.2f} GiB at most"
    print(f"{size / 1e9:.2f} GB in {told}")
    parts = ("", "wav2vec2", "dvae", "detector")
    found = {name: numbers(folder / name / "model.safetensors") for name in parts}
    assert found[""] > 238e6 and found["wav2vec2"] == 94_396_320 and found["dvae"] == 53_786_240 + 43_829_766
    assert found["detector"] > 65_439_822
    # The processors' time, as that on the wall depends on what else they do.
    assert busy < MOST_SECONDS and peak < MOST_MEMORY, told
