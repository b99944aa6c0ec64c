"""Writes the examples that the report shows: examples.json, PNG pictures and MP3 recordings (format:
report.py)."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

SAMPLE_RATE = 16_000


class Examples:
    """Collects examples of a split; media are written once per sample, named by its number."""

    def __init__(self, directory: Path, source):
        self.directory, self.source = Path(directory), source
        (self.directory / "media").mkdir(parents=True, exist_ok=True)
        kinds = ("retrieval", "captions", "transcripts", "labels", "questions", "generated")
        self.content = {name: [] for name in kinds}

    def show(self, row: int, modalities: Sequence[str]) -> dict[str, str]:
        """{'text': caption, 'image': path, 'audio': path} of a sample, those asked for."""
        triplet, shown = self.source.read(row), {}
        if "text" in modalities:
            shown["text"] = triplet.caption
        if "image" in modalities and triplet.image is not None:
            shown["image"] = self.picture(f"{row}.png", triplet.image)
        if "audio" in modalities:
            path = self.directory / "media" / f"{row}.mp3"
            if not path.exists():  # a fifth of the size of WAV: the report holds many
                soundfile.write(path, triplet.audio, SAMPLE_RATE, format="MP3")
            shown["audio"] = f"media/{row}.mp3"
        return shown

    def picture(self, name: str, image: np.ndarray) -> str:
        Image.fromarray(image).save(self.directory / "media" / name)
        return f"media/{name}"

    def retrieval(self, direction, queries, item, query: int, items: Sequence[int], scores) -> None:
        """One query and its best items, as rows of the source; scores may be None."""
        key = self.source.caption(query)
        results = [self.show(row, (item,)) | {"correct": self.source.caption(row) == key} for row in items]
        for result, score in zip(results, () if scores is None else scores, strict=False):
            result["score"] = float(score)
        self.content["retrieval"].append(
            {"direction": direction, "query": self.show(query, queries), "results": results}
        )

    def caption(self, row: int, texts: dict[str, str], available: Sequence[str]) -> None:
        """Captions from 'image', 'audio' and 'image_audio' beside the references."""
        references = list(self.source.read(row, image=False, audio=False).references)
        names = {"image": "from_image", "audio": "from_audio", "image_audio": "from_both"}
        written = {names[source]: text for source, text in texts.items()}
        shown = self.show(row, [name for name in ("image", "audio") if name in available])
        self.content["captions"].append(shown | {"references": references} | written)

    def transcript(self, row: int, texts: dict[str, str]) -> None:
        """The transcripts from 'audio' and 'image_audio', those there are, beside the truth."""
        shown = self.show(row, ("text", "audio"))
        entry = {"audio": shown["audio"], "truth": shown["text"]}
        if "audio" in texts:
            entry["from_audio"] = texts["audio"]
        if "image_audio" in texts:
            entry["from_audio_image"] = texts["image_audio"]
        self.content["transcripts"].append(entry)

    def labels(self, row: int, found: dict, truths: Sequence[str], modalities: Sequence[str]) -> None:
        """Labels beside what of the sample they are told from.

        found: {'T+I': {label: probability}} by what was shown. truths: the right ones.
        """
        told = [{"inputs": name, "labels": labels} for name, labels in found.items()]
        self.content["labels"].append(self.show(row, modalities) | {"found": told, "truths": list(truths)})

    def question(self, row: int, answers: dict, truths: Sequence[str], modalities: Sequence[str]) -> None:
        """A question, which is the sample's text, beside what of the sample it is asked with.

        answers: {'T+I': (chosen, written)} by what was shown. truths: the right ones.
        """
        shown = self.show(row, ("text", *(name for name in modalities if name != "text")))
        said = [{"inputs": name, "chosen": both[0], "written": both[1]} for name, both in answers.items()]
        self.content["questions"].append(shown | {"answers": said, "truths": list(truths)})

    def generated(self, row: int, reconstructed: np.ndarray, pictures: dict[str, np.ndarray]) -> None:
        """A sample's pictures, uint8 [H, W, 3]: the real one, that through the dVAE, and those drawn, by what
        they are drawn from: 'text', 'audio', 'text_audio'."""
        shown = self.show(row, ("text", "image"))
        names = {"text": "text", "audio": "speech", "text_audio": "both"}
        entry = {
            "text": shown["text"],
            "real": shown["image"],
            "reconstructed": self.picture(f"{row}-reconstructed.png", reconstructed),
            "generated": [self.picture(f"{row}-from-{name}.png", x) for name, x in pictures.items()],
            "drawn_from": [names[name] for name in pictures],
        }
        self.content["generated"].append(entry)

    def write(self) -> None:
        (self.directory / "examples.json").write_text(json.dumps(self.content, indent=1) + "\n")
