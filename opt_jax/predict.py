"""Asks a trained model about a picture, a text, a recording, or several of them together.

    python -m opt_jax.predict --workdir=runs/tiny --image=dog.jpg --audio=dog.wav
    python -m opt_jax.predict --workdir=runs/tiny --text="a red ball" --out=ball.png
    python -m opt_jax.predict --workdir=runs/tiny --image=dog.jpg --text="a dog" --text="a cat"
    python -m opt_jax.predict --workdir=runs/tiny_vqa --image=dog.jpg --text="what colour is the dog?"

From a pre-training a picture gets a caption; a recording a transcript, with the picture's help where there is
one; a text, or a recording, without a picture is drawn into --out. Of a picture and a recording it is told
how well each text goes with them, best first: `similarity`, the cosine of the alignment embeddings, and
`match`, the probability that the matching head gives against nothing belonging together.

From a fine-tuning there is the one answer that it was taught, from what it was taught to see (config.inputs):
all parameters have moved for one loss, and nothing held what other answers need; ask the pre-training for
those. Captioning, speech recognition, text to image and retrieval answer as above. Classification tells the
five most probable `labels`; vqa the five most probable `answers` to a question about the picture, which is
asked by --text or by --audio, and the `answer_written` by the text decoder.

Exit codes: 0 done; 2 the inputs do not fit (the message says what to do).
"""

import argparse
import json
import sys
from pathlib import Path

from absl import logging
from PIL import Image

from opt_jax.answers import finetuned_answers, pretrained_answers
from opt_jax.data.decoding import check_caption
from opt_jax.data.files import decoded, read_file
from opt_jax.data.triplet import Triplet, UnusableSampleError
from opt_jax.trained import WorkdirError, load_finetuned, load_trained, read_config


def read(path: str, part: str):
    """A picture (uint8 [h, w, 3]) or recording (float32 [N]) from a file. Raises UnusableSampleError."""
    place = Path(path).resolve()
    return decoded(read_file(place.parent, place.name, place.name, part), place.name, place.name, part)


def parse(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "opt_jax.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--workdir", required=True, help="of a pre-training, or of a fine-tuning")
    add("--pretrained", help="of a fine-tuning: where the pre-training is now, if no longer where it was")
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
        finetuned = "task" in read_config(flags.workdir)
        # Before the model is loaded, which takes longer than to see that a file is none.
        for text in flags.text:
            check_caption(text, text[:40])
        triplet = Triplet(
            "input",
            image=read(flags.image, "image") if flags.image else None,
            audio=read(flags.audio, "audio") if flags.audio else None,
        )
        if finetuned:
            trained, answer = load_finetuned(flags.workdir, flags.step, flags.pretrained), finetuned_answers
        elif flags.pretrained:
            raise WorkdirError(f"--pretrained is for a fine-tuning; {flags.workdir} is a pre-training's")
        else:
            trained, answer = load_trained(flags.workdir, flags.step), pretrained_answers
        answers = answer(trained, triplet, flags.text, flags.seed)
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
    for name in ("label", "answer"):
        for said in answers.get(f"{name}s", ()):
            found.append(f"{name} {said[name]!r}: {100 * said['probability']:.1f} %")
    if "answer_written" in answers:
        found.append(f"answer written: {answers['answer_written']}")
    for said in answers.get("texts", ()):
        near = f", similarity {said['similarity']:.2f}" if "similarity" in said else ""
        found.append(f"{said['with']} and {said['text']!r}: match {100 * said['match']:.1f} %{near}")
    return found


if __name__ == "__main__":
    logging.set_verbosity(logging.ERROR)  # what the libraries warn of among themselves hides the answers
    sys.exit(main())
