"""Generates Spoken Scenes: shards in parallel processes, then manifest, captions index and a contact sheet.

Directory: `samples.png` and, for each split, a folder with ArrayRecord shards, `captions.jsonl` (one readable
row per sample) and `manifest.json` (settings, classes, counts, hashes), which is written last.
"""

import dataclasses
import hashlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from ml_collections import ConfigDict

from opt_jax.data.spoken_scenes import speech
from opt_jax.data.spoken_scenes.contact_sheet import write_contact_sheet
from opt_jax.data.spoken_scenes.questions import ANSWERS
from opt_jax.data.spoken_scenes.scene import CLASS_NAMES
from opt_jax.data.spoken_scenes.sentences import SPLITS
from opt_jax.data.spoken_scenes.shard import ShardTask, record_path, write_json
from opt_jax.data.spoken_scenes.source import SpokenScenes
from opt_jax.data.triplet import SourceError
from opt_jax.metrics_log import progress

GENERATOR_VERSION = 1
_REFERENCES = {"train": 1, "validation": 5, "test": 5}


def default_config() -> ConfigDict:
    """8,000 training pictures of 128 x 128; test and validation speak in voices unknown to training."""
    voices = dict(train=speech.TRAIN_VOICES, validation=speech.VALIDATION_VOICES, test=speech.TEST_VOICES)
    return ConfigDict(
        dict(
            train=8000,
            validation=300,
            test=500,
            image_size=128,
            max_objects=5,
            voices=voices,
            shard_size=500,
        )
    )


def generate(
    directory, config: ConfigDict, seed: int, processes: int = 2, asks: bool = False
) -> dict[str, int]:
    """Makes all splits in `directory`; the same config and seed give the same bytes.

    A finished shard is kept when generation is started again after an interruption.

    Args:
      directory: where to write; made if absent.
      config: see `default_config`.
      seed: of everything drawn.
      processes: shards made at the same time; has no influence on the data.
      asks: questions about the pictures instead of sentences, with their answers as labels.

    Returns:
      number of samples by split.

    Raises:
      ModuleNotFoundError: espeakng-loader is not installed.
      ValueError: a split is empty or shares voices with training, or `directory` holds other data.
      SourceError: a shard's process failed.
    """
    speech.load_espeak()
    for split in SPLITS:
        if config[split] < 1:
            raise ValueError(f"{split} must have at least one sample, got {config[split]}")
    for split in ("validation", "test"):
        if shared := set(config.voices[split]) & set(config.voices.train):
            raise ValueError(f"voices.{split} shares {sorted(shared)} with voices.train; take unheard voices")
    directory = Path(directory)
    tasks = {split: _tasks(directory / split, split, config, seed, asks) for split in SPLITS}
    stale = [split for split in SPLITS if not _is_complete(directory / split, tasks[split])]
    if stale:
        _make_shards([task for split in stale for task in tasks[split]], processes)
        for split in stale:
            _finish_split(directory / split, tasks[split])
    if stale or not (directory / "samples.png").exists():
        write_contact_sheet(SpokenScenes(directory, "train"), directory / "samples.png")
    return {split: config[split] for split in SPLITS}


def has_all_shards(directory: Path) -> bool:
    """Whether all that finished data in `directory` list is there; `generate` makes what is missing again."""
    folders = [Path(directory) / split for split in SPLITS]
    if not all((folder / "manifest.json").is_file() for folder in folders):
        return False
    shards = [
        folder / shard["file"]
        for folder in folders
        for shard in json.loads((folder / "manifest.json").read_text())["shards"]
    ]
    return all(shard.is_file() for shard in shards)


def _tasks(folder: Path, split: str, config: ConfigDict, seed: int, asks: bool) -> list[ShardTask]:
    starts = range(0, config[split], config.shard_size)
    return [
        ShardTask(
            split=split,
            start=start,
            count=min(config.shard_size, config[split] - start),
            references=_REFERENCES[split],
            voices=tuple(config.voices[split]),
            image_size=config.image_size,
            max_objects=config.max_objects,
            seed=seed,
            path=str(folder / f"{split}.array_record-{number:05d}-of-{len(starts):05d}"),
            asks=asks,
        )
        for number, start in enumerate(starts)
    ]


def _settings(tasks: list[ShardTask]) -> dict:
    return {"generator_version": GENERATOR_VERSION, "shards": [task.inputs() for task in tasks]}


def _is_complete(folder: Path, tasks: list[ShardTask]) -> bool:
    path = folder / "manifest.json"
    if not path.exists():
        return False
    found, wanted = json.loads(path.read_text())["settings"], _settings(tasks)
    if found != wanted:
        raise ValueError(f"{path} is of other settings than asked for; give another directory or delete it")
    return all(Path(task.path).is_file() for task in tasks)


def _make_shards(tasks: list[ShardTask], processes: int) -> None:
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    failures: list[str] = []
    running: set[subprocess.Popen] = set()
    stopped = threading.Event()
    lock = threading.Lock()
    with progress(sum(task.count for task in tasks), "Spoken Scenes") as bar:
        for task in tasks:
            if _read_record(task) is not None:
                bar.update(task.count)
            else:
                Path(task.path).parent.mkdir(parents=True, exist_ok=True)
                waiting.put(task)

        def work():
            while not (failures or stopped.is_set()):
                try:
                    task = waiting.get_nowait()
                except queue.Empty:
                    return
                done = 0
                for now, error in _run_process(task, running):
                    if error and not stopped.is_set():
                        failures.append(error)
                    with lock:
                        bar.update(now - done)
                    done = now

        threads = [threading.Thread(target=work) for _ in range(processes)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        finally:  # interrupted: an unfinished shard is made again by the next run
            stopped.set()
            for process in list(running):
                process.terminate()
    if failures:
        raise SourceError(failures[0])


def _run_process(task: ShardTask, running: set[subprocess.Popen]):
    """Yields (samples done, None) while the shard's process runs, and (samples done, message) if it fails.

    The process is in `running` as long as it lives.
    """
    root = str(Path(__file__).resolve().parents[3])  # the checkout, also when the package is not installed
    paths = [root] + [p for p in (os.environ.get("PYTHONPATH"),) if p]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    # One thread each: the processes share the cores, and sums over several threads need not be reproducible.
    environment |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = 0
    with tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, "-m", "opt_jax.data.spoken_scenes.shard"]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
        with subprocess.Popen(command, text=True, env=environment, **pipes) as process:
            running.add(process)
            process.stdin.write(json.dumps(dataclasses.asdict(task)))
            process.stdin.close()
            for line in process.stdout:
                done = int(line)
                yield done, None
        running.discard(process)
        if process.returncode != 0:
            errors.seek(0)
            # The last line of a traceback is the error itself.
            why = errors.read().strip().rpartition("\n")[2] or "it said nothing, as when it is killed"
            yield done, (
                f"making {task.path} failed (exit status {process.returncode}): {why}; mend that and run the"
                " same command again, which keeps the finished shards"
            )


def _read_record(task: ShardTask) -> dict | None:
    """The record of a shard that is finished, made from the same inputs, and whole; None otherwise."""
    path = Path(task.path)
    if not (record_path(path).exists() and path.exists()):
        return None
    record = json.loads(record_path(path).read_text())
    intact = hashlib.sha256(path.read_bytes()).hexdigest() == record["sha256"]
    return record if intact and record["inputs"] == task.inputs() else None


def _finish_split(folder: Path, tasks: list[ShardTask]) -> None:
    """Writes the captions index and the manifest, then clears the shards' records and what a kill left."""
    records = [json.loads(record_path(Path(task.path)).read_text()) for task in tasks]
    rows = [row for record in records for row in record["rows"]]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "captions.jsonl").write_text(lines)
    manifest = {
        "name": "spoken_scenes",
        "split": tasks[0].split,
        "count": len(rows),
        "seconds_of_speech": round(sum(row["seconds"] for row in rows), 1),
        "class_names": list(ANSWERS if tasks[0].asks else CLASS_NAMES),
        "sample_rate": speech.SAMPLE_RATE,
        "captions_sha256": hashlib.sha256(lines.encode()).hexdigest(),
        "shards": [
            {"file": Path(task.path).name, "count": task.count, "sha256": record["sha256"]}
            for task, record in zip(tasks, records, strict=True)
        ],
        "settings": _settings(tasks),
    }
    write_json(folder / "manifest.json", manifest)
    for task in tasks:
        record_path(Path(task.path)).unlink()
    for leftover in folder.glob("*.writing*"):
        leftover.unlink()
