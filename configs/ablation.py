"""Pre-training without one family of objectives at a time, on the features of a pre-training (OPT, table 5).

    python -m opt_jax.main --config=configs/ablation.py --config.pretrained=runs/tiny

Six trainings of about half the steps of `tiny`; a cell that is done is skipped, an interrupted one goes on.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The configuration."""
    config = ConfigDict()
    config.task = "ablation"
    config.pretrained = "runs/tiny"  # the --workdir whose data, encoders, features and settings are used
    config.workdir = "runs/ablation"
    config.seed = 0
    config.distributed = ConfigDict(dict(coordinator="", num_processes=0, process_id=-1))
    config.steps = 900
    # The paper's families: masked words, masked regions, masked frames, modality level, sample level.
    config.families = ConfigDict(
        {
            "MLM": ("mlm",),
            "MVM": ("mvfr", "mrc"),
            "MAM": ("mafr", "macl"),
            "modality level": ("dtr", "dir"),
            "sample level": ("matching",),
        }
    )
    config.evaluation = ConfigDict(
        dict(batch_size=100, pool_size=100, pools=5, matching_pools=2, validation_pools=3, rerank_top=0)
        | dict(probe_train=1500)
    )
    # Of `tiny` on a quiet 2-core machine, as in configs/pretrain.py; 0: not measured.
    config.predicted_step_seconds = 0.38
    config.predicted_minutes = ConfigDict(dict(evaluation=16.0))
    return config
