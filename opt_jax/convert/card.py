"""The model card of an exported folder: its use, training data, results, licence and limits."""

from collections.abc import Mapping
from pathlib import PurePath

from opt_jax.convert.card_results import best, drawn, results
from opt_jax.convert.card_usage import code
from opt_jax.convert.preparation import Preparation
from opt_jax.data.sources import parse

TESTED = "torch 2.13, transformers 5.23, safetensors 0.8, Pillow 13.0 and soundfile 0.14"
SPOKEN_SCENES = (
    "*Spoken Scenes*, which the project makes itself: rendered pictures of coloured shapes, sentences that"
    " describe them, and these sentences spoken by a speech synthesizer (espeak-ng)"
)
PARTS = {
    "detector": "`detector/`: Faster R-CNN, whose regions stand for a picture",
    "dvae": "`dvae/`: the discrete VAE, which turns pictures into codes and back",
    "wav2vec2": "`wav2vec2/`: wav2vec 2.0, which transformers' own classes load as well",
}


def model_card(prepared: Preparation, config: Mapping, name: str, only: str, evaluated: bool) -> str:
    """README.md for a folder of this name.

    prepared: with the encoders that the folder holds. config: of its config.json. only: 'all', or 'encoder'
    without the decoders. evaluated: whether the training's results.json is about this step.

    Raises: ExportError: the training's results.json is damaged.
    """
    task = prepared.config.get("task")
    trained = f"fine-tuned for {task.replace('_', ' ')}" if task else "pre-trained"
    parts = [
        "---\nlibrary_name: transformers\nlicense: other\ntags: [image, speech, text]\n---\n",
        f"# {' '.join(name.split())}\n",
        "OPT, the Omni-Perception Pre-Trainer ([arXiv 2107.00249](https://arxiv.org/abs/2107.00249)): one"
        f" encoder-decoder over text, pictures and speech, {trained} with opt_jax and exported to"
        f" PyTorch after step {prepared.step:,}. {config['num_layers']} layers of {config['hidden_size']},"
        f" {config['vocab_size']} word pieces, weights in {config['dtype']}.\n",
        "## Usage\n",
        "Needs torch, safetensors and transformers; Pillow for pictures, soundfile to read sound files."
        f" Tested with {TESTED}; older versions were not tried.\n",
        code(prepared, only, name),
        "\n`processing_opt_jax.py` and `modeling_opt_jax.py` say what goes in and what comes out. A model"
        " that was trained on is kept by `model.save_pretrained(folder)` and"
        " `processor.save_pretrained(folder)`.\n",
        *(f"- {PARTS[part]}" for part, place in prepared.encoders.items() if place),
        "- No BERT: texts are read by the network itself. Where it began with BERT's weights, they have been"
        " trained since, and are among its own.",
        "\n## Training data\n",
        training_data(prepared) + "\n",
        "## Results\n",
        results(prepared, config["dtype"], only, evaluated),
        "## Licence\n",
        "The modelling files are under the Apache License 2.0. The weights are under the terms of the data"
        " and of the frozen encoders that they were made of, which opt_jax does not know: hence `other`.\n",
        "## Limitations\n",
        limitations(prepared, only),
    ]
    return "\n".join(parts)


def training_data(prepared: Preparation) -> str:
    """What the run was given; files by their names alone, as where they lay is nobody's business."""
    source = described(prepared.data.source, prepared.data.manifest)
    if "task" not in prepared.config:
        return f"{prepared.rows:,} rows of {source}. Step by step: opt_jax, `--config=configs/pretrain.py`."
    before = f"the data of its pre-training, {prepared.rows:,} rows of {source}"
    data = prepared.config.data
    if data.kind == "source":
        return f"Fine-tuned on {named(data.source)}, after {before}."
    if data.kind == "noise":
        return f"Fine-tuned on {before}. White noise was added, the speech {data.decibels:g} dB louder."
    if data.kind == "questions":
        return f"Fine-tuned on questions that were made about {before}."
    return f"Fine-tuned on {before}."


def described(source: str, manifest: str) -> str:
    """The data of a pre-training with these `config.data`."""
    return SPOKEN_SCENES if source == "spoken_scenes" else named(manifest or source)


def named(spec: str) -> str:
    """A source's kind and file name, of each of its parts (see `opt_jax.data.sources`): 'vqa:/a/b.json,c=d'
    -> '`b.json` (vqa)'."""
    parts = [parse(part.strip())[:2] for part in spec.split(" + ")]
    return " and ".join(f"`{PurePath(path).name or path}` ({kind})" for kind, path in parts)


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
    there, here = drawn(prepared)
    if prepared.config.get("task") == "text_to_image" and there > here and only == "all":
        told.append(
            f"The evaluation kept {best(there)} for each text; here {best(here)} is drawn, as what ranks them"
            " is the matching head of the pre-trained model, which is not in this folder."
        )
    if only == "encoder":
        told.append("The decoders were left out: it neither writes nor draws.")
    return "".join(f"- {line}\n" for line in told)
