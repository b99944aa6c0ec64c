"""Questions about the pictures of Spoken Scenes, written and spoken (OPT, table 6).

python -m opt_jax.main --config=configs/finetune/vqa.py --config.pretrained=runs/tiny
"""

from pathlib import Path

from ml_collections import ConfigDict

from opt_jax.configuration import load


def get_config(variant: str = "tiny") -> ConfigDict:
    """The configuration, for a pre-training of this variant."""
    config = load(Path(__file__).with_name("defaults.py"), variant)
    config.task = "vqa"
    config.workdir = f"runs/{variant}_vqa"
    config.data = ConfigDict(dict(kind="questions", train=8000, validation=300, test=1000))
    config.inputs = ("T+I", "I+A", "T", "A")  # the question read or heard, with the picture and without
    config.label_smoothing = 0.1
    config.train.steps = 1500
    return config
