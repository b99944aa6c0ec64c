"""Transcripts from speech, alone and beside the picture (OPT, table 4).

python -m opt_jax.main --config=configs/finetune/speech_recognition.py --config.pretrained=runs/tiny
"""

from pathlib import Path

from ml_collections import ConfigDict

from opt_jax.configuration import load


def get_config(variant: str = "tiny") -> ConfigDict:
    """The configuration, for a pre-training of this variant."""
    config = load(Path(__file__).with_name("defaults.py"), variant)
    config.task = "speech_recognition"
    config.workdir = f"runs/{variant}_speech_recognition"
    # Kind 'noise': the same recordings with white noise, the speech so many decibels louder; cached anew.
    config.data.update(dict(decibels=0.0, seed=0))
    config.inputs = ("A", "I+A")
    config.label_smoothing = 0.1
    config.evaluation.update(dict(texts=500, beams=3, pools=5))  # pools: parts, for the difference's error
    return config
