"""Multi-label classification from every set of modalities (OPT, table 2).

python -m opt_jax.main --config=configs/finetune/classification.py --config.pretrained=runs/tiny
"""

from pathlib import Path

from ml_collections import ConfigDict

from opt_jax.configuration import load


def get_config(variant: str = "tiny") -> ConfigDict:
    """The configuration, for a pre-training of this variant."""
    config = load(Path(__file__).with_name("defaults.py"), variant)
    config.task = "classification"
    config.workdir = f"runs/{variant}_classification"
    config.inputs = ("T", "I", "A", "T+I", "T+A", "I+A", "T+I+A")
    if variant == "tiny":
        config.train.update(dict(steps=1000, learning_rate=1e-3))  # of a classifier that starts fresh
        config.predicted_step_seconds = 0.38
        config.predicted_minutes.update(dict(before=2.7, evaluation=0.2))
    config.evaluation.probe_train = 4000  # rows for the linear probe of the pre-trained model
    return config
