"""What the configurations of the downstream tasks have in common; each of them loads this one."""

from ml_collections import ConfigDict

from opt_jax.configuration import choose

# Of the pre-training that is gone on from, by its variant.
VARIANTS = {
    "tiny": dict(dropout=0.1, steps=400, batch_size=32, learning_rate=3e-4, warmup_steps=40),
    # 5e-5 and batches of 64 to 128 are BERT's and UNITER's usual choice.
    "base": dict(dropout=0.1, steps=10_000, batch_size=128, learning_rate=5e-5, warmup_steps=1000),
}


def get_config(variant: str = "tiny") -> ConfigDict:
    """All that is not a task's own, for a pre-training of this variant in runs/."""
    v = choose(variant, VARIANTS)
    config = ConfigDict()
    config.variant = variant
    config.task = ""
    config.pretrained = f"runs/{variant}"  # the --workdir of a pre-training
    config.pretrained_step = 0  # 0: its last
    config.workdir = ""
    config.seed = 0
    config.precision = "float32"
    config.distributed = ConfigDict(dict(coordinator="", num_processes=0, process_id=-1))
    # 'pretraining': the pre-training's; 'source': what `source` names (opt_jax/data/sources.py), cached anew
    # by the pre-training's encoders.
    config.data = ConfigDict(dict(kind="pretraining", source=""))
    config.inputs = ()  # what is shown, as in ("I", "A", "I+A"); training draws one for each row
    config.dropout = v["dropout"]
    config.train = ConfigDict(
        dict(
            steps=v["steps"],
            batch_size=v["batch_size"],
            accumulation=1,
            learning_rate=v["learning_rate"],
            warmup_steps=v["warmup_steps"],
            decay="linear",
            end_learning_rate_fraction=0.0,
            beta1=0.9,
            beta2=0.98,
            epsilon=1e-6,
            weight_decay=0.01,
            clip_norm=1.0,
            log_every=50,
            checkpoint_every=1000,
            checkpoint_minutes=10.0,
            keep=1,
            max_nonfinite=10,
            mesh=dict(data=-1, fsdp=1, tensor=1),
        )
    )
    config.train.precision = config.get_ref("precision")
    config.evaluation = ConfigDict(dict(batch_size=100, examples=12))
    # On a quiet 2-core machine; 0: not measured. What is trained does not depend on them.
    config.predicted_step_seconds = 0.6 if variant == "tiny" else 0.0
    config.predicted_minutes = ConfigDict(dict(before=0.0, evaluation=0.0))
    return config
