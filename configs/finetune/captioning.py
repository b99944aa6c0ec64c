"""Captions from pictures, from speech and from both (OPT, table 6).

python -m opt_jax.main --config=configs/finetune/captioning.py --config.pretrained=runs/tiny
"""

from pathlib import Path

from ml_collections import ConfigDict

from opt_jax.configuration import load


def get_config(variant: str = "tiny") -> ConfigDict:
    """The configuration, for a pre-training of this variant."""
    config = load(Path(__file__).with_name("defaults.py"), variant)
    config.task = "captioning"
    config.workdir = f"runs/{variant}_captioning"
    config.inputs = ("I", "A", "I+A")
    config.label_smoothing = 0.1
    config.evaluation.update(dict(texts=500, beams=3))
    # For CIDEr: a file of `python -m opt_jax.evaluation.cider`; '': of the test texts themselves.
    config.evaluation.document_frequencies = ""
    if variant == "tiny":
        config.predicted_minutes.update(dict(before=0.4, evaluation=0.6))
    return config
