"""The tables of the downstream tasks, from results as fine-tunings leave them."""

import json
from pathlib import Path

import pytest

from opt_jax import tables

ROOT = Path(__file__).parents[1]


def workdir(path, results, seed=0, task="captioning", more=None, **data):
    path.mkdir()
    config = {"task": task, "seed": seed, "data": {"kind": "pretraining"} | data} | (more or {})
    (path / "config.json").write_text(json.dumps(config))
    (path / "results.json").write_text(json.dumps(results))
    return path


def test_seeds_become_mean_and_deviation_before_and_after(tmp_path):
    first = {"captioning/image/CIDEr": 200.0, "before/captioning/image/CIDEr": 100.0, "seconds/finetune": 9.0}
    found = tables.tables(
        [
            workdir(tmp_path / "a", first | {"captioning/audio/CIDEr": 90.0}),
            workdir(tmp_path / "b", first | {"captioning/image/CIDEr": 204.0}, seed=1),
        ]
    )
    assert "**captioning** (pretraining; 2 seeds)" in found
    assert "| captioning | CIDEr |" in found  # no column without figures
    assert "| image | 100.0 → 202.0 ± 2.8 |" in found
    assert "| audio |  |" in found  # one seed lacks it
    assert "seconds" not in found


def test_tasks_and_kinds_of_data_are_kept_apart(tmp_path):
    clean = workdir(tmp_path / "a", {"speech_recognition/audio/WER": 4.0}, task="speech_recognition")
    noisy = workdir(
        tmp_path / "b",
        {"speech_recognition/audio/WER": 40.0},
        task="speech_recognition",
        **{"kind": "noise", "decibels": 0.0},
    )
    drawn = workdir(tmp_path / "c", {"text_to_image/named_objects_found": 33.0}, task="text_to_image")
    found = tables.tables([clean, noisy, drawn])
    assert "(speech in noise, 0 dB; one seed)" in found
    assert "| audio | 4.0 |" in found and "| audio | 40.0 |" in found
    assert "| text_to_image | named_objects_found |" in found


def test_runs_that_differ_in_more_than_the_seed_are_refused(tmp_path):
    results = {"captioning/image/CIDEr": 1.0}
    same = {"train": {"steps": 400}}
    first = workdir(tmp_path / "a", results, more=same | {"workdir": "a", "pretrained": "x"})
    newer = {"workdir": "b", "pretrained": "y", "predicted_minutes": {"before": 1.0}, "draws": []}
    second = workdir(tmp_path / "b", results, seed=1, more=same | newer)
    assert "2 seeds" in tables.tables([first, second])
    other = workdir(tmp_path / "d", results | {"pretrained": "digest"}, seed=3, more=same)
    with pytest.raises(tables.TableError, match="d was fine-tuned from another pre-training than .*a; make"):
        tables.tables([first, second, other])
    third = workdir(tmp_path / "c", results, seed=2, more={"train": {"steps": 800}})
    with pytest.raises(tables.TableError, match=r"c is no other seed of .*a: train.steps: 400 -> 800; make"):
        tables.tables([first, second, third])


def test_sources_are_told_apart(tmp_path):
    results = {"captioning/image/CIDEr": 1.0}
    runs = [workdir(tmp_path / name, results, kind="source", source=f"karpathy:{name}.json") for name in "ab"]
    found = tables.tables(runs)
    assert "**captioning** (karpathy:a.json; one seed)" in found and "(karpathy:b.json; one seed)" in found


def test_the_results_that_are_kept_here_make_tables():
    kept = sorted((ROOT / "configs" / "reference" / "finetune").iterdir())
    found = tables.tables(kept)
    assert sum(line.startswith("**") for line in found.splitlines()) > 3


def test_what_is_no_fine_tuning_is_told(tmp_path, capsys):
    assert tables.main([str(tmp_path / "nothing")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    same = [workdir(tmp_path / name, {"captioning/image/CIDEr": 1.0}) for name in "ab"]
    with pytest.raises(tables.TableError, match="seed 0"):
        tables.tables(same)
    pretraining = tmp_path / "pretraining"
    pretraining.mkdir()
    for name in ("config.json", "results.json"):
        (pretraining / name).write_text("{}")
    with pytest.raises(tables.TableError, match="not that of a fine-tuning"):
        tables.tables([pretraining])
