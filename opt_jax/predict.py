"""Asks a trained model about a picture, a text, a recording, or several of them together.

    python -m opt_jax.predict --workdir=runs/tiny --image=dog.jpg --audio=dog.wav
    python -m opt_jax.predict --workdir=runs/tiny --text="a red ball" --out=ball.png
    python -m opt_jax.predict --workdir=runs/tiny --image=dog.jpg --text="a dog" --text="a cat"

A picture gets a caption; a recording a transcript, with the picture's help where there is one; a text, or a
recording, without a picture is drawn into --out. Of a picture and a recording it is told how well each text
goes with them, best first: `similarity`, the cosine of the alignment embeddings, and `match`, the probability
that the matching head gives against nothing belonging together. Exit codes: 0 done; 2 the inputs do not fit
(the message says what to do).
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from opt_jax.data.decoding import check_caption
from opt_jax.data.files import decoded, read_file
from opt_jax.data.triplet import Triplet, UnusableSampleError
from opt_jax.encoders import dvae
from opt_jax.trained import Trained, WorkdirError, load_trained

DRAWN = 8  # pictures, of which the one that matches best is kept
MAX_WORD_PIECES = 64


def predict(trained: Trained, triplet: Triplet, texts: list[str], seed: int = 0) -> dict:
    """What the model says of a triplet.

    Args:
      triplet: image, audio, both or neither. texts: any number. seed: of the pictures that are drawn.

    Returns: of {'caption', 'transcript': str, 'picture': uint8 [H, W, 3], 'texts': [{'text', 'with',
      'similarity', 'match'}]} those that the inputs allow.

    Raises UnusableSampleError for an input that cannot be used, or of a kind that the model was trained
    without.
    """
    answers, model = {}, trained.model
    image, audio = triplet.image is not None, triplet.audio is not None
    batch = trained.batch([triplet]) if image or audio else None
    options = {
        "max_length": MAX_WORD_PIECES,
        "end_id": trained.tokenizer.sep_id,
        "pad_id": trained.tokenizer.pad_id,
        "beams": trained.config.evaluation.beams,
    }

    def written(keep) -> str:
        return trained.tokenizer.decode([int(i) for i in model.text(batch, keep, **options)[0]])

    if image:
        answers["caption"] = written((False, True, False))
    if audio:
        answers["transcript"] = written((False, image, True))
    if not image and trained.dvae is not None and (audio or len(texts) == 1):
        answers["picture"] = draw(trained, triplet, texts, seed)
    if texts and (image or audio):
        shown = [name for name, there in (("image", image), ("audio", audio)) if there]
        answers["texts"] = compare(trained, triplet, texts, shown)
    return answers


def draw(trained: Trained, triplet: Triplet, texts: list[str], seed: int) -> np.ndarray:
    """A picture uint8 [H, W, 3] of a text or a recording: of several the one that matches best."""
    keep = (bool(texts), False, triplet.audio is not None)
    described = Triplet(triplet.id, caption=texts[0] if texts else None, audio=triplet.audio)
    batch = {name: np.repeat(x, DRAWN, 0) for name, x in trained.batch([described]).items()}
    codes = trained.model.codes(batch, keep, seed, top_k=trained.config.evaluation.top_k)
    pictures = dvae.decode(trained.dvae, codes)
    query = "text" if texts else "audio"
    shown = trained.batch([dataclasses.replace(described, image=picture) for picture in pictures])
    return pictures[int(trained.model.matching(shown, (query,), "image")[0].argmax())]


def compare(trained: Trained, triplet: Triplet, texts: list[str], shown: list[str]) -> list[dict]:
    """How well each text goes with the picture and with the recording, best first."""
    batch = trained.batch([dataclasses.replace(triplet, caption=text) for text in texts])
    aligned = trained.model.model.config["num_alignment_layers"]
    unit = trained.model.embeddings(batch) if aligned else {}
    found = []
    for other in shown:
        logits = trained.model.matching(batch, (other,), "text")[0]
        for i, text in enumerate(texts):
            said = {"text": text, "with": other, "match": float(1 / (1 + np.exp(-logits[i])))}
            if aligned:
                said["similarity"] = float(unit["text"][i] @ unit[other][i])
            found.append(said)
    return sorted(found, key=lambda said: (said["with"], -said["match"]))


def read(path: str, part: str):
    """A picture (uint8 [h, w, 3]) or recording (float32 [N]) from a file. Raises UnusableSampleError."""
    place = Path(path).resolve()
    return decoded(read_file(place.parent, place.name, place.name, part), place.name, place.name, part)


def parse(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "opt_jax.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--workdir", required=True, help="of a training")
    add("--step", type=int, help="of the training, by default the last that was saved")
    add("--image", help="a picture file")
    add("--audio", help="a recording")
    add("--text", action="append", default=[], help="may be given several times")
    add("--out", type=Path, default=Path("picture.png"), help="where a drawn picture is written")
    add("--seed", type=int, default=0, help="of the pictures drawn")
    add("--json", action="store_true", help="print JSON")
    flags = parser.parse_args(arguments)
    if not (flags.image or flags.audio or flags.text):
        parser.error("give --image, --audio or --text")
    if len(flags.text) > 1 and not (flags.image or flags.audio):
        parser.error("several texts are compared with a picture or a recording: give --image or --audio")
    if not flags.out.parent.is_dir() or flags.out.suffix.lower() not in (".png", ".jpg", ".webp"):
        parser.error(f"--out={flags.out}: expected a .png, .jpg or .webp in a folder that is there")
    return flags


def main(arguments=None) -> int:
    # Not above: it defines flags, which other programs that import this module have no use for.
    from opt_jax.main import expected_errors, refuse

    flags = parse(arguments)
    try:
        trained = load_trained(flags.workdir, flags.step)
        for text in flags.text:
            check_caption(text, text[:40])
        answers = predict(
            trained,
            Triplet(
                "input",
                image=read(flags.image, "image") if flags.image else None,
                audio=read(flags.audio, "audio") if flags.audio else None,
            ),
            flags.text,
            flags.seed,
        )
    except (*expected_errors(), UnusableSampleError, WorkdirError) as error:
        refuse(error)
    if "picture" in answers:
        picture = Image.fromarray(answers["picture"])
        picture.resize((4 * picture.width, 4 * picture.height), Image.Resampling.BICUBIC).save(flags.out)
        answers["picture"] = str(flags.out)
    print(json.dumps(answers, indent=1) if flags.json else "\n".join(lines(answers)))
    return 0


def lines(answers: dict) -> list[str]:
    """The answers for people."""
    found = [f"{name}: {answers[name]}" for name in ("caption", "transcript", "picture") if name in answers]
    for said in answers.get("texts", ()):
        near = f", similarity {said['similarity']:.2f}" if "similarity" in said else ""
        found.append(f"{said['with']} and {said['text']!r}: match {100 * said['match']:.1f} %{near}")
    return found


if __name__ == "__main__":
    sys.exit(main())
