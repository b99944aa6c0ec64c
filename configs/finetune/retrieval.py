"""Retrieval by the matching head, with a margin and hard negatives (OPT, table 3).

python -m opt_jax.main --config=configs/finetune/retrieval.py --config.pretrained=runs/tiny
"""

from pathlib import Path

from ml_collections import ConfigDict

from opt_jax.configuration import load


def get_config(variant: str = "tiny") -> ConfigDict:
    """The configuration, for a pre-training of this variant."""
    config = load(Path(__file__).with_name("defaults.py"), variant)
    config.task = "retrieval"
    config.workdir = f"runs/{variant}_retrieval"
    if variant == "tiny":
        config.train.batch_size = 128
        config.predicted_step_seconds = 3.3
        config.predicted_minutes.update(dict(before=5.8, evaluation=5.4))
    config.inputs = ("T+I", "T+A", "T+I+A")  # pairs; the last: text with speech, and the picture
    config.margin = 0.2  # between probabilities
    config.contrastive_weight = 1.0
    config.text_weight = 1.0  # of the caption's likelihood given the item alone, one of the scorers
    # Pairs of so many rows of a batch are trained, each beside so many wrong items and so many queries of
    # others, which all rows of the batch may give.
    config.anchors = 32 if variant == "tiny" else config.train.batch_size
    config.negatives = 2
    config.hard_fraction = 0.8  # of the pairs: with negatives drawn by similarity; the others evenly
    config.hard_temperature = 0.1
    config.evaluation.update(
        dict(pool_size=200, pools=2, matching_pools=2, validation_pools=1, rerank_top=20)
        # In one pool of more than `exhaustive` (the paper's has 5,000) alignment makes short lists, and only
        # the pairs on these are scored, of so many queries at a time.
        | dict(exhaustive=500, shortlist=50, chunk=50)
    )
    return config
