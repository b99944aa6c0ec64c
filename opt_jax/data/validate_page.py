"""The page of `opt_jax.data.validate`: samples to look at and to hear, what is wrong, counts; one file.

Texts are untrusted: all are escaped, and the page forbids itself scripts and any load from elsewhere.
"""

import base64
import io
from pathlib import Path

import jinja2
import numpy as np
import soundfile
from PIL import Image

from opt_jax.data.decoding import SAMPLE_RATE
from opt_jax.data.triplet import Source
from opt_jax.data.validate_summary import TOP, Findings, headline, shown, size
from opt_jax.evaluation import report, report_figures

WIDEST = 320  # pixels of a picture on the page
SMALL = 160  # pixels up to which a picture is drawn larger, and kept without loss
HEARD = 10  # seconds of a recording
PROBLEMS = 12


def write_page(path: Path, name: str, found: Findings) -> None:
    """Writes the page. `name` is the source's, for the title. Raises OSError."""
    folders = [Path(__file__).parent, Path(report.__file__).parent]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(shown=shown, size=size, duration=report_figures.duration)
    classes = {"Classes": found.tally.labels, "Speakers": found.tally.speakers, "Sizes": found.tally.sizes}
    distinct, frequent = found.frequent_captions()
    page = environment.get_template("validate.html.jinja").render(
        name=name,
        headline=headline(found),
        found=found,
        tally=found.tally,
        distinct=distinct,
        top={"Captions": frequent} | {key: counts.most_common(TOP) for key, counts in classes.items()},
        kinds=found.tally.kinds.most_common(TOP),
        samples=[_sample(found.sources[split], split, row) for _, split, row in found.tally.samples],
        problems=[
            _sample(found.sources[problem["split"]], problem["split"], problem["row"]) | problem
            for problem in found.problems[:PROBLEMS]
        ],
        heard=HEARD,
    )
    path = Path(path)
    aside = path.with_name(path.name + ".partial")
    aside.write_text(page, encoding="utf-8", errors="backslashreplace")
    aside.replace(path)


def _sample(source: Source, split: str, row: int) -> dict:
    """What can be read of a sample, its picture and sound as data URIs; one part may be broken."""
    sample = {"split": split, "row": row, "origin": source.origin(row), "caption": source.caption(row)}
    for image, audio in ((False, False), (True, False), (False, True)):
        try:
            triplet = source.read(row, image=image, audio=audio)
        except Exception:  # what is wrong stands beside it
            continue
        sample |= {"id": triplet.id, "speaker": triplet.speaker}
        sample["references"] = triplet.references[1:]
        sample["labels"] = [source.class_names[label] for label in triplet.labels]
        if triplet.image is not None:
            height, width = triplet.image.shape[:2]
            sample |= {"picture": picture(triplet.image), "pixels": f"{width} x {height}"}
            sample["small"] = max(height, width) <= SMALL
        if triplet.audio is not None:
            sample |= {"sound": sound(triplet.audio), "seconds": len(triplet.audio) / SAMPLE_RATE}
        if triplet.regions is not None:
            sample["regions"] = len(triplet.regions.features)
    return sample


def picture(image: np.ndarray) -> str:
    """uint8 [h, w, 3] as a data URI, at most WIDEST pixels wide and high."""
    drawn, content = Image.fromarray(image), io.BytesIO()
    drawn.thumbnail((WIDEST, WIDEST))
    kind = "png" if max(image.shape[:2]) <= SMALL else "jpeg"
    drawn.save(content, kind, **({"quality": 85} if kind == "jpeg" else {}))
    return _uri(f"image/{kind}", content)


def sound(audio: np.ndarray) -> str:
    """float32 [N], 16 kHz, as a data URI of MP3: the first HEARD seconds."""
    content = io.BytesIO()
    soundfile.write(content, audio[: HEARD * SAMPLE_RATE], SAMPLE_RATE, format="MP3")
    return _uri("audio/mpeg", content)


def _uri(kind: str, content: io.BytesIO) -> str:
    return f"data:{kind};base64,{base64.b64encode(content.getvalue()).decode()}"
