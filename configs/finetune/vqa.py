"""Questions about the pictures of Spoken Scenes, written and spoken (OPT, table 6), or other questions.

python -m opt_jax.main --config=configs/finetune/vqa.py --config.pretrained=runs/tiny

Of VQA v2: --config.data.kind=source --config.data.source='vqa:...' (opt_jax/data/vqa.py), which are written
only: --config.inputs="('T+I','T')".
"""

from pathlib import Path

from ml_collections import ConfigDict

from opt_jax.configuration import load


def get_config(variant: str = "tiny") -> ConfigDict:
    """The configuration, for a pre-training of this variant."""
    config = load(Path(__file__).with_name("defaults.py"), variant)
    config.task = "vqa"
    config.workdir = f"runs/{variant}_vqa"
    config.data.update(dict(kind="questions", train=16_000, validation=300, test=1000, seed=0))
    # The question read or heard, with the picture, and read without it; answers.json has the first set's.
    config.inputs = ("T+I", "I+A", "T")
    # How often training draws a set with the picture for each time that it draws one without, from which
    # there is only the habit to learn.
    config.picture_weight = 3.0
    config.label_smoothing = 0.1
    if variant == "tiny":
        # To find in the picture what a question asks for is new to the model, and comes late: after 1,500
        # steps 50 % of the colours were right, with batches of 32 at 1e-3; 98 % with 64 at 1.5e-3.
        config.train.update(dict(steps=3000, batch_size=64, learning_rate=1.5e-3))
    return config
