"""The model card's lines of Python: one or two for each thing that an exported model was taught."""

import json

from opt_jax.answers import taught
from opt_jax.convert.preparation import Preparation
from opt_jax.evaluation.scorers import Keep

LOAD = """```python
from transformers import AutoModel, AutoProcessor

folder = {folder}  # where it lies
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
{lines}
```"""
# Class of matching_logits that says that two go together (see `OptJaxOutput`); the last says that none do.
PAIRS = {(False, True, True): 1, (True, False, True): 2, (True, True, False): 3}


def code(prepared: Preparation, only: str, name: str) -> str:
    """What loads the folder of this name and asks it everything that it answers; Markdown."""
    return LOAD.format(folder=json.dumps(name), lines="\n".join(usage(prepared, only)))


def usage(prepared: Preparation, only: str) -> list[str]:
    """Lines that ask a `model` with its `processor`.

    only: 'all', or 'encoder' for a folder without the decoders. The files that they name are dog.jpg and
    dog.wav; a picture goes to picture.png.
    """
    able = abilities(prepared)
    if "task" in prepared.config:
        return finetuned_usage(prepared.config, able, only)
    lines, (_, sees, hears) = [], able
    if only == "all" and sees:
        lines.append('print(processor.caption(model, "dog.jpg"))')
    if only == "all" and hears:
        lines.append('print(processor.transcribe(model, "dog.wav"))')
    if only == "all" and sees and prepared.encoders.get("dvae"):
        lines.append('processor.draw(model, "a dog").save("picture.png")')
    return lines + asked((True, sees, hears and not sees))


def abilities(prepared: Preparation) -> Keep:
    """Of text, pictures and recordings those that the folder's processor can prepare."""
    sees = prepared.settings["regions"] in ("detector", "grid")
    return True, sees, bool(prepared.encoders.get("wav2vec2"))


def finetuned_usage(config, able: Keep, only: str) -> list[str]:
    """As `usage`, of what a fine-tuning was taught: shown the first of its sets of inputs that can be
    prepared here."""
    sets = [keep for keep in taught(config) if all(can for can, kept in zip(able, keep, strict=True) if kept)]
    if not sets:
        return ["# What it was taught needs inputs that were prepared elsewhere: see modeling_opt_jax.py."]
    shown, task = sets[0], config.task
    if task in ("classification", "vqa"):
        question = "what is this?" if task == "vqa" else "a dog"
        lines = [
            f"output = model(**processor({arguments(shown, question)}))",
            "number = output.logits[0].argmax().item()",
            "print(model.config.id2label[number], output.logits[0, number].sigmoid().item())",
        ]
        written = f"print(processor.write(model, num_beams=1, {arguments(shown, question)}))"
        return lines + ([written] if task == "vqa" and only == "all" else [])
    if task == "retrieval" or only == "encoder":
        return asked(shown)
    if task == "text_to_image":
        return [f'processor.draw(model, {arguments(shown)}).save("picture.png")']
    return [f"print(processor.write(model, {arguments(shown)}))"]


def asked(keep: Keep) -> list[str]:
    """The model's output for inputs, and of two whether they go together."""
    lines = [f"output = model(**processor({arguments(keep)}))"]
    if keep in PAIRS:
        lines.append(f"match, none = output.matching_logits[0, [{PAIRS[keep]}, 4]]")
        return [*lines, "print((match - none).sigmoid().item())  # the probability that they go together"]
    return [*lines, "print(output.last_hidden_state.shape)"]


def arguments(keep: Keep, text: str = "a dog") -> str:
    """(True, True, False) -> 'text="a dog", image="dog.jpg"'."""
    given = (f'text="{text}"', 'image="dog.jpg"', 'audio="dog.wav"')
    return ", ".join(one for one, kept in zip(given, keep, strict=True) if kept)
