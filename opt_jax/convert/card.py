"""The model card of an exported folder: its use, training data, results, licence and limits."""

import json
from collections.abc import Mapping

from opt_jax.convert.preparation import Preparation
from opt_jax.evaluation.report_figures import headlines

SHOWN = 12  # figures, of those that have no headline
SPOKEN_SCENES = (
    "*Spoken Scenes*, which the project makes itself: rendered pictures of coloured shapes, sentences that"
    " describe them, and these sentences spoken by a speech synthesizer (espeak-ng)"
)
LOAD = """```python
from transformers import AutoModel, AutoProcessor

folder = "{name}"  # where it lies
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
{lines}```"""
PARTS = {
    "detector": "`detector/`: Faster R-CNN, whose regions stand for a picture",
    "dvae": "`dvae/`: the discrete VAE, which turns pictures into codes and back",
    "wav2vec2": "`wav2vec2/`: wav2vec 2.0, which transformers' own classes load as well",
}


def model_card(prepared: Preparation, config: Mapping, name: str, only: str) -> str:
    """README.md for a folder of this name. config: of its config.json; only: what was exported."""
    task = prepared.config.get("task")
    trained = f"fine-tuned for {task.replace('_', ' ')}" if task else "pre-trained"
    parts = [
        "---\nlibrary_name: transformers\nlicense: apache-2.0\ntags: [image, speech, text]\n---\n",
        f"# {name}\n",
        "OPT, the Omni-Perception Pre-Trainer ([arXiv 2107.00249](https://arxiv.org/abs/2107.00249)): one"
        f" encoder-decoder over text, pictures and speech, {trained} with opt_jax and exported to PyTorch."
        f" {config['num_layers']} layers of {config['hidden_size']}, {config['vocab_size']} word pieces.\n",
        "## Usage\n",
        "Needs torch, safetensors and transformers; Pillow for pictures, soundfile to read sound files.\n",
        LOAD.format(name=name, lines=usage(prepared, only)),
        "\n`processing_opt_jax.py` and `modeling_opt_jax.py` say what goes in and what comes out.\n",
        *(f"- {PARTS[part]}" for part, place in prepared.encoders.items() if place),
        "\n## Training data\n",
        training_data(prepared) + "\n",
        "## Results\n",
        results(prepared),
        "## Licence\n",
        "The modelling files are under the Apache License 2.0. The weights come with the terms of the data"
        " and of the frozen encoders that they were made of.\n",
        "## Limitations\n",
        limitations(prepared, only),
    ]
    return "\n".join(parts)


def usage(prepared: Preparation, only: str) -> str:
    """Lines of Python: one for each thing that the model can do."""
    able = [name for name, place in prepared.encoders.items() if place]
    lines = []
    sees = prepared.settings["regions"] in ("detector", "grid")
    if only == "all" and sees:
        lines.append('print(processor.caption(model, "dog.jpg"))')
    if only == "all" and "wav2vec2" in able:
        lines.append('print(processor.transcribe(model, "dog.wav"))')
    if only == "all" and "dvae" in able and sees:
        lines.append('processor.draw(model, "a dog").save("picture.png")')
    seen = ', image="dog.jpg"' if sees else ""
    lines += [f'output = model(**processor(text="a dog"{seen}))', "print(output.matching_logits.sigmoid())"]
    return "\n".join(lines) + "\n"


def training_data(prepared: Preparation) -> str:
    """What the run was given."""
    data = prepared.config.data
    if "task" in prepared.config:
        own = data.kind == "source"
        return f"Fine-tuned on {f'`{data.source}`' if own else 'the data of its pre-training'}."
    source = SPOKEN_SCENES if data.source == "spoken_scenes" else f"`{data.manifest or data.source}`"
    return f"{prepared.rows:,} rows of {source}. Step by step: opt_jax, `--config=configs/pretrain.py`."


def results(prepared: Preparation) -> str:
    """A table of the figures in results.json."""
    path = prepared.workdir / "results.json"
    if not path.is_file():
        return "This training was not evaluated.\n"
    found = {name: value for name, value in json.loads(path.read_text()).items() if value is not None}
    rows = [(row["name"], row["value"], row["beside"]) for row in headlines(found)]
    others = [name for name in found if not name.startswith(("seconds/", "encoders/", "set_aside/"))]
    rows = rows or [(f"`{name}`", found[name], "") for name in others[:SHOWN]]
    lines = [f"| {name} | {value:.2f} | {beside} |" for name, value, beside in rows]
    return "\n".join(["On its test split:\n", "| figure | value | beside |", "|---|---|---|", *lines, ""])


def limitations(prepared: Preparation, only: str) -> str:
    """What a user should know before relying on it."""
    settings = prepared.settings
    told = [
        f"Texts are read up to {settings['max_text_tokens']} word pieces. What is longer is cut.",
        "It knows what its training data show, and writes, draws and ranks wrongly beyond that.",
        "Texts and pictures that it makes may be wrong or unfair; look at them before they are used.",
    ]
    if prepared.encoders.get("wav2vec2"):
        seconds = settings["max_seconds"]
        told.insert(1, f"Recordings are heard for {seconds:g} s, and as far as the model has positions.")
    if settings["regions"] == "ready":
        told.append("Pictures are given as regions that a detector elsewhere found.")
    if "task" in prepared.config:
        told.append("Fine-tuning moved all parameters for one task; for others use the pre-trained model.")
    if only == "encoder":
        told.append("The decoders were left out: it neither writes nor draws.")
    return "".join(f"- {line}\n" for line in told)
