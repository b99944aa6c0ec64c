"""Questions about the pictures of Spoken Scenes, written and spoken (OPT, table 6), or other questions.

python -m opt_jax.main --config=configs/finetune/vqa.py --config.pretrained=runs/tiny

Of VQA v2: --config.data.kind=source --config.data.source='vqa:...' (opt_jax/data/vqa.py), which are written
only: --config.inputs="('T+I','T')" --config.draws="(4.,1.)".
"""

from pathlib import Path

from ml_collections import ConfigDict

from opt_jax.configuration import load


def get_config(variant: str = "tiny") -> ConfigDict:
    """The configuration, for a pre-training of this variant."""
    config = load(Path(__file__).with_name("defaults.py"), variant)
    config.task = "vqa"
    config.workdir = f"runs/{variant}_vqa"
    config.data.update(dict(kind="questions", train=8000, validation=300, test=1000, seed=0))  # Spoken Scenes
    # The question read or heard, with the picture and without. answers.json has what the first set gives.
    config.inputs = ("T+I", "I+A", "T", "A")
    config.draws = (4.0, 4.0, 1.0, 1.0)  # without it there is only the habit to learn
    config.label_smoothing = 0.1
    if variant == "tiny":
        # Questions and their answers are new to the model: nearly as much to learn as in pre-training.
        config.train.update(dict(steps=1500, learning_rate=1e-3))
    return config
