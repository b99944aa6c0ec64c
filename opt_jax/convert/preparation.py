"""What turns files into the inputs of an exported model: the frozen encoders, the tokenizer, the settings."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ml_collections import ConfigDict

from opt_jax.answers import DRAWN
from opt_jax.cache.manifest import read_manifest
from opt_jax.encoders.tokenizer import Tokenizer
from opt_jax.encoders.wav2vec2_extraction import CONTEXT_SECONDS, WINDOW_SECONDS
from opt_jax.trained import TRAIN_FEATURES, Trained

PROCESSOR = "processing_opt_jax.OptJaxProcessor"
SPECIAL = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}


@dataclass(frozen=True)
class Preparation:
    """Attributes:
    encoders: directories of the frozen encoders by name, None for one that was not used.
    settings: of preprocessor_config.json.
    workdir: of the training that is exported, with its config.
    data: `config.data` of the pre-training. rows: of these data. step: of the training, that is exported.
    """

    encoders: Mapping[str, Path | None]
    settings: Mapping
    workdir: Path
    config: ConfigDict
    data: ConfigDict
    rows: int
    step: int

    def write(self, folder: Path, tokenizer: Tokenizer) -> None:
        """The files of the tokenizer and of the settings, as transformers reads them."""
        (folder / "tokenizer.json").write_text(tokenizer.model.to_str(pretty=True), encoding="utf-8")
        longest = {"model_max_length": self.settings["max_text_tokens"]}
        names = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        names |= {"model_input_names": ["input_ids", "attention_mask"], **longest, **SPECIAL}
        files = {"tokenizer_config.json": names, "special_tokens_map.json": SPECIAL}
        for name, content in (files | {"preprocessor_config.json": self.settings}).items():
            (folder / name).write_text(json.dumps(content, indent=1) + "\n")


def preparation(
    trained: Trained, workdir: Path, config: ConfigDict, step: int, class_names: Sequence[str]
) -> Preparation:
    """Of a pre-trained model; workdir, config, step and class_names: of the training that is exported, its
    own or a fine-tuning of it."""
    settings, extraction, fine_tuned = trained.config, trained.extraction, "task" in config
    kind = "detector" if extraction.detector else "grid" if extraction.pictures else "none"
    manifest = read_manifest(trained.directory / TRAIN_FEATURES)
    written = {
        "auto_map": {"AutoProcessor": PROCESSOR},
        "regions": "ready" if extraction.ready else kind,
        "grid_window": extraction.grid_window,
        "max_regions": trained.regions,
        "max_text_tokens": settings.loader.text_lengths[-1],
        "max_audio_positions": settings.loader.audio_lengths[-1],
        "max_seconds": extraction.max_seconds,
        "audio_stack": settings.cache.audio_stack,
        "window_seconds": WINDOW_SECONDS,
        "context_seconds": CONTEXT_SECONDS,
        "feature_dtype": extraction.feature_dtype,
        **writing(trained, config, class_names),
        "top_k": config.evaluation.get("top_k", settings.evaluation.top_k),
        "guidance": config.evaluation.get("guidance", 0.0),
        # Of several pictures that which matches best is kept, by the head of the pre-training.
        "num_drawn": 1 if fine_tuned else DRAWN,
        "task": config.task if fine_tuned else None,
    }
    return Preparation(trained.encoders, written, workdir, config, settings.data, manifest.num_rows, step)


def writing(trained: Trained, config: ConfigDict, class_names: Sequence[str]) -> dict[str, int]:
    """How texts are written: as the evaluation of the training with this config does."""
    if config.get("task") == "vqa":  # greedily, as long as the longest answer with its [SEP], without [CLS]
        longest = max(len(trained.tokenizer.encode(answer)) for answer in class_names) - 1
        return {"num_beams": 1, "max_new_tokens": longest}
    before = trained.config.evaluation
    beams = config.evaluation.get("beams", before.beams)
    return {"num_beams": beams, "max_new_tokens": before.max_new_tokens}
