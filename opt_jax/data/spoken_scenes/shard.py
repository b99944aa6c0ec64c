"""Makes one shard, in a process of its own: `python -m opt_jax.data.spoken_scenes.shard`, settings on stdin.

A fresh process because espeak's waveforms depend on what its process spoke before (see `speech.Synthesizer`).
"""

import dataclasses
import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from opt_jax.data.spoken_scenes.questions import ANSWERS, ask
from opt_jax.data.spoken_scenes.record import encode
from opt_jax.data.spoken_scenes.render import render
from opt_jax.data.spoken_scenes.scene import Scene, draw_scene
from opt_jax.data.spoken_scenes.sentences import SPLITS, describe_for_split
from opt_jax.data.spoken_scenes.speech import SAMPLE_RATE, Synthesizer
from opt_jax.data.triplet import Triplet

_REPORT_EVERY = 20


@dataclasses.dataclass(frozen=True)
class ShardTask:
    """What determines a shard's bytes, and where they go.

    Attributes:
      split: 'train', 'validation' or 'test'.
      start: index in the split of the first sample.
      count: number of samples.
      references: sentences per picture.
      voices: espeak voices to draw from.
      image_size: side of the pictures in pixels.
      max_objects: most objects in a picture.
      seed: of the whole data set.
      path: the shard's file; its record is written beside it as `path` + '.json'.
      asks: captions are questions, and their answers are the labels; `references` then means nothing.
    """

    split: str
    start: int
    count: int
    references: int
    voices: tuple[str, ...]
    image_size: int
    max_objects: int
    seed: int
    path: str
    asks: bool = False

    def inputs(self) -> dict:
        """All that the bytes depend on: the task without its folder."""
        inputs = {**dataclasses.asdict(self), "path": Path(self.path).name, "voices": list(self.voices)}
        if not self.asks:  # data made before there were questions are still what is asked for
            del inputs["asks"]
        return inputs


def draw_sample(task: ShardTask, index: int, synthesizer: Synthesizer) -> tuple[Triplet, Scene]:
    """Draws sample `index` of the split; its picture and text depend on (seed, split, index) only."""
    rng = np.random.default_rng((task.seed, SPLITS.index(task.split), index))
    sentences = None
    while sentences is None:
        scene = draw_scene(rng, task.image_size, task.max_objects)
        if task.asks:
            question, answer = ask(rng, scene)
            sentences, labels = [(question, ())], (ANSWERS.index(answer),)
        else:
            sentences = describe_for_split(rng, scene, task.split, task.references)
            labels = scene.labels()
    caption, named = sentences[0]
    voice = task.voices[int(rng.integers(len(task.voices)))]
    audio = synthesizer.speak(
        caption,
        voice,
        words_per_minute=int(rng.integers(170, 231)),
        pitch=int(rng.integers(35, 66)),
        level=float(0.08 * 10 ** rng.uniform(-0.2, 0.2)),  # 8 dB between the softest and the loudest
    )
    sample = Triplet(
        id=f"{task.split}-{index:06d}",
        image=render(rng, scene),
        caption=caption,
        audio=audio,
        references=tuple(sentence for sentence, _ in sentences),
        labels=labels,
        boxes=scene.boxes(),
        classes=scene.classes(),
        named=named,
        speaker=voice,
    )
    return sample, scene


def make_shard(task: ShardTask, report=lambda done: None) -> None:
    """Writes the shard aside, renames it, then writes its record: inputs, sha256, index rows."""
    path = Path(task.path)
    aside = path.with_name(path.name + f".writing{os.getpid()}")
    synthesizer = Synthesizer()
    writer = ArrayRecordWriter(str(aside), "group_size:1,uncompressed")
    rows = []
    for position in range(task.count):
        sample, scene = draw_sample(task, task.start + position, synthesizer)
        writer.write(encode(sample))
        rows.append(_index_row(sample, scene))
        if (position + 1) % _REPORT_EVERY == 0 or position + 1 == task.count:
            report(position + 1)
    writer.close()
    digest = hashlib.sha256(aside.read_bytes()).hexdigest()
    os.replace(aside, path)
    write_json(record_path(path), {"inputs": task.inputs(), "sha256": digest, "rows": rows})


def record_path(path: Path) -> Path:
    """Where the record of a finished shard lies."""
    return path.with_name(path.name + ".json")


def write_json(path: Path, value) -> None:
    """Writes JSON aside and renames it, so that a reader never sees half a file."""
    aside = path.with_name(path.name + f".writing{os.getpid()}")
    aside.write_text(json.dumps(value, indent=1 if path.name == "manifest.json" else None) + "\n")
    os.replace(aside, path)


def _index_row(sample: Triplet, scene: Scene) -> dict:
    return {
        "id": sample.id,
        "caption": sample.caption,
        "references": list(sample.references),
        "objects": [f"{o.size} {o.colour} {o.shape}" for o in scene.objects],
        "boxes": [[round(float(v), 2) for v in box] for box in sample.boxes],
        "named": list(sample.named),
        "labels": list(sample.labels),
        "speaker": sample.speaker,
        "seconds": round(len(sample.audio) / SAMPLE_RATE, 3),
    }


def _main() -> None:
    fields = json.load(sys.stdin)
    task = ShardTask(**{**fields, "voices": tuple(fields["voices"])})
    make_shard(task, report=lambda done: print(done, flush=True))


if __name__ == "__main__":
    _main()
