"""One self-contained HTML file out of a run's directory: `write_report(workdir)`.

What it reads, all under the work directory; whatever is missing leaves its section out:

- `results.json`: flat keys to numbers, null where not finite; percent unless said otherwise.
  `retrieval/<direction>/R@<k>` is the best combination, with image_to_text, text_to_image, text_to_audio,
  audio_to_text or text_audio_to_image. The same under `retrieval_alignment/`, `retrieval_matching/`,
  `retrieval_likelihood/`, `retrieval_information/`; `retrieval_both/` for text_audio_to_image, and
  `retrieval_information_alone/` for image_to_text.
  `retrieval/pool` (items) gives the chance row, `retrieval/description` says what the best combination is,
  `R@1_standard_error` is over pools.
  `speech_recognition/<audio|audio_image>/<WER|CER>`,
  `captioning/<image|audio|image_audio>/<BLEU-4|CIDEr|CIDEr-plain>`,
  `classification/<T|I|...|T+I+A|chance>/mAP`,
  `question_answering/<T+I|...>/<accuracy|accuracy_written>`, the same with `_<kind of question>` after it,
  `question_answering/most_frequent/accuracy`,
  `text_to_image/<code_accuracy|code_majority|named_objects_found|named_objects_ceiling>`,
  `encoders/<encoder>/<figure>` in the encoder's own unit, `seconds/<stage>`. For the summary line:
  `triplets/train`, `triplets/test`, `parameters`. Keys of no section are listed at the end.
  `before/<key>` is what the pre-trained model had, where `<key>` is that of the fine-tuned one.
- `config.json`: shown as it is; its `variant`, if a text, is in the title.
- `metrics.jsonl` and `encoders/**/metrics.jsonl`, see `opt_jax.metrics_log`.
- `encoders/**/*.png`: pictures the encoders' trainings left, such as dvae/before_after.png.
- `evaluation/examples.json`: {
    "retrieval":   [{"direction": as above, "query": {any of "text", "image", "audio"},
                     "results": [{"text" | "image" | "audio", "score": number, "correct": bool}]}],
    "captions":    [{"image", "audio", "references": [text], "from_image", "from_audio", "from_both": text}],
    "transcripts": [{"audio", "truth": text, "from_audio", "from_audio_image": text}],
    "labels":      [{"text", "image", "audio", "truths": [text],
                     "found": [{"inputs": "T+I" or the like, "labels": {text: probability}}]}],
    "questions":   [{"text", "image", "audio", "truths": [text],
                     "answers": [{"inputs": "T+I" or the like, "chosen", "written": text}]}],
    "generated":   [{"text", "real": picture, "reconstructed": picture, "generated": [picture],
                     "drawn_from": [text], as many}]}.
  Every list and field may be missing. Pictures are PNG and audio is MP3 or WAV, as paths relative to
  `evaluation/`.

Texts and paths are untrusted: all are escaped, files are read only inside `evaluation/` and `encoders/`, up
to a size, and the page forbids itself scripts and any load from elsewhere.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from opt_jax.evaluation import report_figures
from opt_jax.evaluation.differences import closest, word_differences
from opt_jax.evaluation.line_plot import line_plot, short_number, smoothed
from opt_jax.evaluation.media import Media
from opt_jax.metrics_log import read_metrics

_SECTIONS = ("speech_recognition", "captioning", "classification", "question_answering", "text_to_image")
_SECTIONS += ("encoders", "seconds")
_EXAMPLES = ("retrieval", "captions", "transcripts", "labels", "questions", "generated")
_ALSO_SHOWN = ("triplets/train", "triplets/test", "parameters")


def write_report(workdir: Path) -> Path:
    """Writes workdir/report.html and returns its path. ValueError for a file that is not in its format."""
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise ValueError(f"no run to report on: {workdir} is not a directory")
    results = {k: v for k, v in _read_object(workdir / "results.json").items() if v is not None}
    config = _read_object(workdir / "config.json")
    examples = _read_object(workdir / "evaluation" / "examples.json")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=_number, short=short_number, duration=report_figures.duration)
    environment.globals.update(differences=word_differences, closest=closest)
    page = environment.get_template("report.html.jinja").render(
        variant=config.get("variant") if isinstance(config.get("variant"), str) else None,
        results=results,
        config=json.dumps(config, indent=2, ensure_ascii=False) if config else None,
        gains=report_figures.gains(results),
        headlines=report_figures.headlines(results),
        stages=report_figures.stages(results),
        total_seconds=results.get("seconds/total", sum(s["seconds"] for s in report_figures.stages(results))),
        retrieval=report_figures.retrieval_table(results),
        directions=report_figures.RETRIEVAL_DIRECTIONS,
        speech_recognition=report_figures.grid(results, "speech_recognition"),
        captioning=report_figures.grid(results, "captioning", ("BLEU-4", "CIDEr", "CIDEr-plain")),
        classification=report_figures.grid(results, "classification"),
        questions=report_figures.question_tables(results),
        generation=report_figures.generation_rows(results),
        examples={name: _list(examples, name) for name in _EXAMPLES},
        media=Media(workdir / "evaluation"),
        pretraining=_trainings(workdir / "metrics.jsonl"),
        encoders=_encoders(workdir / "encoders", results),
        others={k: v for k, v in results.items() if not _has_place(k, results)},
    )
    path = workdir / "report.html"
    aside = path.with_suffix(".partial")
    aside.write_text(page, encoding="utf-8")
    aside.replace(path)
    return path


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file, {} without one."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, found {type(content).__name__}")
    return content


def _list(examples: Mapping, name: str) -> list[dict]:
    found = examples.get(name, [])
    if not isinstance(found, list) or not all(isinstance(example, dict) for example in found):
        raise ValueError(f"evaluation/examples.json: {name!r} must be a list of objects")
    return found


def _trainings(path: Path) -> list[dict]:
    """The trainings in a metrics file, in order: {"name", "steps", "plots": [{"name", "last", "svg"}]}."""
    curves = {}
    for line in read_metrics(path):
        training = curves.setdefault(line["name"], {})
        for key in line.keys() - {"name", "step"}:
            if line[key] is None or isinstance(line[key], int | float):
                value = math.nan if line[key] is None else float(line[key])
                training.setdefault(key, []).append((line["step"], value))
    return [
        {
            "name": name,
            "steps": max(step for curve in training.values() for step, _ in curve),
            "plots": [_plot(key, training) for key in sorted(training, key=_order) if _tells(key, training)],
        }
        for name, training in curves.items()
        if training
    ]


def _plot(key: str, training: Mapping[str, list]) -> dict:
    """One measure, with its validation values where there are any."""
    steps, values = np.array(training[key]).T
    validation = np.array(training.get(f"validation/{key}", np.zeros((0, 2)))).T
    finite = values[np.isfinite(values)]
    last = smoothed(finite)[-1] if len(finite) else math.nan
    svg = line_plot(steps, values, name=key, validation=validation, log=key.endswith("gradient_norm"))
    return {"name": key, "last": last, "svg": svg}


def _tells(key: str, training: Mapping[str, list]) -> bool:
    """Whether a measure needs a plot of its own: not drawn in another's, and no idle counter."""
    if key in ("loss_scale", "skipped"):
        return len({value for _, value in training[key]}) > 1
    return not (key.startswith("validation/") and key.removeprefix("validation/") in training)


def _order(key: str) -> tuple[int, str]:
    """Total loss, the other losses, then what tells how the training went."""
    conduct = ("learning_rate", "gradient_norm", "loss_scale", "skipped", "per_second", "seconds")
    return (2 if any(word in key for word in conduct) else 0 if key in ("loss", "total") else 1, key)


def _encoders(directory: Path, results: Mapping) -> list[dict]:
    """One entry per encoder: {"name", "figures", "trainings", "pictures": [{"name", "media"}]}."""
    media = Media(directory, max_total_bytes=1_500_000)
    figures = [key for key in results if key.startswith("encoders/")]
    names = [d.name for d in sorted(directory.iterdir()) if d.is_dir()] if directory.is_dir() else []
    encoders = []
    for name in dict.fromkeys([*names, *(key.split("/")[1] for key in figures)]):
        logs, pictures = (
            sorted((directory / name).rglob("metrics.jsonl")),
            sorted((directory / name).rglob("*.png")),
        )
        encoders.append(
            {
                "name": name,
                "figures": {
                    k.split("/", 2)[2]: results[k] for k in figures if k.startswith(f"encoders/{name}/")
                },
                "trainings": [training for log in logs for training in _trainings(log)],
                "pictures": [
                    {
                        "name": p.stem.replace("_", " "),
                        "media": media.inline(str(p.relative_to(directory)), "image"),
                    }
                    for p in pictures[:4]
                ],
            }
        )
    return [e for e in encoders if e["figures"] or e["trainings"] or e["pictures"]]


def _has_place(key: str, results: Mapping) -> bool:
    section = key.split("/")[0]
    if section == "before" or f"before/{key}" in results:
        return True
    return section in _SECTIONS or section in report_figures.RETRIEVAL_SCORERS or key in _ALSO_SHOWN


def _number(value: Any, digits: int | None = None) -> str:
    """A figure for reading: counts as they are, others with one digit or those asked for; a dash for none."""
    if value is None or isinstance(value, float) and not math.isfinite(value):
        return "–"
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) and digits is None else f"{value:,.{digits or 1}f}"
