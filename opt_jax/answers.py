"""What a trained model answers, asked about a picture, a text, a recording, or several of them together.

A pre-trained model gives every answer that its inputs allow. A fine-tuned one gives only the one that it was
taught: fine-tuning moves all parameters for a single loss, and nothing holds what the other answers need.
"""

import dataclasses
import functools

import jax
import numpy as np

from opt_jax.data.triplet import Triplet
from opt_jax.encoders import dvae
from opt_jax.encoders.tokenizer import Tokenizer
from opt_jax.evaluation.scorers import Keep, Model
from opt_jax.models.inputs import uncorrupted
from opt_jax.models.opt import lengths_of
from opt_jax.tasks import input_sets
from opt_jax.tasks.classification import class_logits
from opt_jax.tasks.downstream import AUDIO, IMAGE, TEXT
from opt_jax.tasks.drawing import fitting
from opt_jax.trained import FineTuned, Trained

DRAWN = 8  # pictures, of which the one that matches best is kept
TOLD = 5  # labels, or answers to a question, whatever their probability


def pretrained_answers(trained: Trained, triplet: Triplet, texts: list[str], seed: int = 0) -> dict:
    """What a pre-trained model says of a triplet.

    Args:
      triplet: image, audio, both or neither. texts: any number. seed: of the pictures that are drawn.

    Returns: of {'caption', 'transcript': str, 'picture': uint8 [H, W, 3], 'texts': [{'text', 'with',
      'similarity', 'match'}]} those that the inputs allow.

    Raises UnusableSampleError for an input that cannot be used, or of a kind that the model was trained
    without.
    """
    answers, settings = {}, trained.config.evaluation
    image, audio = triplet.image is not None, triplet.audio is not None
    batch = trained.batch([triplet]) if image or audio else None
    options = {"beams": settings.beams, "max_length": settings.max_new_tokens}
    written = functools.partial(write, trained.tokenizer, trained.model, batch, **options)
    if image:
        answers["caption"] = written((False, True, False))
    if audio:
        answers["transcript"] = written((False, image, True))
    if not image and trained.dvae is not None and (audio or len(texts) == 1):
        described = dataclasses.replace(triplet, caption=texts[0] if texts else None)
        answers["picture"] = draw(trained, trained.model, described, seed, top_k=settings.top_k)
    if texts and (image or audio):
        answers["texts"] = compare(trained, trained.model, triplet, texts)
    return answers


def finetuned_answers(tuned: FineTuned, triplet: Triplet, texts: list[str], seed: int = 0) -> dict:
    """What a fine-tuned model says of a triplet; arguments as those of `pretrained_answers`.

    Returns, by task: {'caption': str}, {'transcript': str}, {'picture': uint8 [H, W, 3]}, {'texts': as of
      `pretrained_answers`}, {'labels': [{'label', 'probability'}]} or {'answers': [{'answer',
      'probability'}], 'answer_written': str}. Of labels and answers the five most probable, best first;
      their probabilities are independent of each other, as several labels may be right.

    Raises InputSetError for what the task was not taught to answer from; UnusableSampleError.
    """
    task, trained, settings = tuned.config.task, tuned.trained, tuned.config.evaluation
    given = (bool(texts), triplet.image is not None, triplet.audio is not None)
    demand(tuned.config, given, len(texts))
    if task == "retrieval":
        return {"texts": compare(trained, tuned.model, triplet, texts)}
    described = dataclasses.replace(triplet, caption=texts[0] if texts else None)
    if task == "text_to_image":
        options = {"number": settings.drawn, "top_k": settings.top_k, "guidance": settings.guidance}
        return {"picture": draw(trained, tuned.model, described, seed, **options)}
    batch = trained.batch([described])
    if task in ("captioning", "speech_recognition"):
        name = "caption" if task == "captioning" else "transcript"
        options = {"beams": settings.beams, "max_length": trained.config.evaluation.max_new_tokens}
        return {name: write(trained.tokenizer, tuned.model, batch, given, **options)}
    if task == "classification":
        return {"labels": choose(tuned, batch, given, "label")}
    # As long as it was taught: the longest answer with its [SEP], without [CLS].
    longest = max(len(trained.tokenizer.encode(answer)) for answer in tuned.class_names) - 1
    written = write(trained.tokenizer, tuned.model, batch, given, beams=1, max_length=longest)
    return {"answers": choose(tuned, batch, given, "answer"), "answer_written": written}


def taught(config) -> list[Keep]:
    """What a fine-tuning was taught to answer from.

    That are its config.inputs; of these a question is answered only with the picture (the others show what
    the question alone gives away), and texts are compared pair by pair.
    """
    sets = [tuple(map(bool, keep)) for keep in input_sets.parse(config.inputs)]
    if config.task == "vqa":
        sets = [keep for keep in sets if keep[IMAGE] and (keep[TEXT] or keep[AUDIO])]
    if config.task == "retrieval":
        sets = [keep for keep in sets if sum(keep) == 2]
        sets += [(True, True, True)] if len(sets) == 2 else []
    return sets


def demand(config, given: Keep, texts: int) -> None:
    """Raises InputSetError where a fine-tuning was not `taught` to answer from what is given."""
    sets = taught(config)
    if given not in sets:
        told = " or ".join(map(flags, sets)) or "nothing that can be asked here"
        raise input_sets.InputSetError(
            f"this {config.task} was taught to answer from {told}; it was given {flags(given)}"
        )
    if texts > 1 and config.task != "retrieval":
        raise input_sets.InputSetError(f"this {config.task} answers from one --text, and was given {texts}")


def flags(keep: Keep) -> str:
    """(True, True, False) -> '--text --image'."""
    return " ".join(f"--{name}" for name, kept in zip(input_sets.NAMES, keep, strict=True) if kept)


def write(tokenizer: Tokenizer, model: Model, batch, keep: Keep, *, beams: int, max_length: int) -> str:
    """The text that a model writes for the first row of a batch, shown `keep`; it ends with its positions."""
    max_length = min(max_length, model.model.config["max_text_positions"])
    options = {"max_length": max_length, "end_id": tokenizer.sep_id, "pad_id": tokenizer.pad_id}
    return tokenizer.decode(model.text(batch, keep, beams=beams, **options)[0])


def draw(trained: Trained, model: Model, described: Triplet, seed: int, number=DRAWN, **options):
    """A picture uint8 [H, W, 3] of a text, a recording or both: of the `number` that `model` draws the one
    that matches best, by the head of the pre-trained model; of a fine-tuned one as its evaluation chooses.
    options: of `Model.codes`."""
    keep = (described.caption is not None, False, described.audio is not None)
    batch = {name: np.repeat(x, number, 0) for name, x in trained.batch([described]).items()}
    pictures = dvae.decode(trained.dvae, model.codes(batch, keep, seed, **options))
    query = "text" if keep[TEXT] else "audio"
    shown = trained.batch([dataclasses.replace(described, image=picture) for picture in pictures])
    if model is trained.model:  # as where it was exported to
        scores = trained.model.matching(shown, (query,), "image")[0]
    else:
        scores = fitting(trained.model, shown, query)
    return pictures[int(scores.argmax())]


def compare(trained: Trained, model: Model, triplet: Triplet, texts: list[str]) -> list[dict]:
    """How well, to `model`, each text goes with the picture and with the recording, best first."""
    batch = trained.batch([dataclasses.replace(triplet, caption=text) for text in texts])
    aligned = model.model.config["num_alignment_layers"]
    unit = model.embeddings(batch) if aligned else {}
    found = []
    for other in [name for name in ("image", "audio") if getattr(triplet, name) is not None]:
        logits = model.matching(batch, (other,), "text")[0]
        for i, text in enumerate(texts):
            said = {"text": text, "with": other, "match": float(1 / (1 + np.exp(-logits[i])))}
            if aligned:
                said["similarity"] = float(unit["text"][i] @ unit[other][i])
            found.append(said)
    return sorted(found, key=lambda said: (said["with"], -said["match"]))


def choose(tuned: FineTuned, batch, keep: Keep, name: str) -> list[dict]:
    """The most probable classes of the first row of a batch, as [{name: class, 'probability'}], best
    first."""
    model = tuned.model
    (probability,) = class_probabilities(
        model.model, model.params, tuned.classes, model.standardise(batch), keep=keep
    )
    best = np.argsort(-probability, kind="stable")[:TOLD]
    return [{name: tuned.class_names[i], "probability": float(probability[i])} for i in best]


@functools.partial(jax.jit, static_argnames=("network", "keep"))
def class_probabilities(network, params, classes, batch, *, keep: Keep) -> jax.Array:
    """[B, C] of a standardised batch shown `keep`; `classes` as `opt_jax.trained.FineTuned` has them."""
    memory, valid = network.apply({"params": params}, uncorrupted(batch, keep), method="encode")
    return jax.nn.sigmoid(class_logits(classes, memory, valid, lengths_of(batch)))
