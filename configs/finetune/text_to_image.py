"""Pictures from text, from speech and from both (OPT, figure 3).

python -m opt_jax.main --config=configs/finetune/text_to_image.py --config.pretrained=runs/tiny
"""

from pathlib import Path

from ml_collections import ConfigDict

from opt_jax.configuration import load


def get_config(variant: str = "tiny") -> ConfigDict:
    """The configuration, for a pre-training of this variant."""
    config = load(Path(__file__).with_name("defaults.py"), variant)
    config.task = "text_to_image"
    config.workdir = f"runs/{variant}_text_to_image"
    config.inputs = ("T", "A", "T+A")
    config.label_smoothing = 0.0
    if variant == "tiny":
        config.train.steps = 800
    # The dVAE's decoder is trained on, with the same codes. No steps: it stays as it is.
    config.picture_decoder = ConfigDict(dict(train=dict(steps=4000 if variant == "tiny" else 0)))
    config.picture_decoder.train.update(
        dict(batch_size=32, learning_rate=2e-3, warmup_steps=50, decay="cosine", weight_decay=0.0)
    )
    config.hidden_fraction = 0.1  # of the rows: shown nothing, for guidance
    # Of so many pictures drawn for each text the one is kept that fits best.
    config.evaluation.update(dict(pictures=100, drawn=32, top_k=32, guidance=1.0, seed=0))
    return config
