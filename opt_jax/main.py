"""The entry point: reads the configuration, prepares JAX, and runs what the configuration describes.

    python -m opt_jax.main --config=configs/pretrain.py:tiny --workdir=runs/tiny --config.train.steps=1000

Interrupted, the same command goes on where it was. Exit codes: 0 done; 2 the configuration, the workdir or
the data do not fit (the message says what to do); 130 and 143 interrupted.
"""

import importlib
import os
import signal
import sys
import tempfile
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from opt_jax.allocator import keep_freed_memory
from opt_jax.configuration import ConfigError, check_overrides, check_whole, load
from opt_jax.stages import StageMismatch, write_record
from opt_jax.tasks.validation import validate as validate_downstream
from opt_jax.validation import validate

CONFIG = config_flags.DEFINE_config_file(
    "config", help_string="Configuration file, with a variant after a colon.", lock_config=True
)
WORKDIR = flags.DEFINE_string("workdir", None, "Where everything is written; by default config.workdir.")


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parsing, after a check that answers in one line what absl would answer in a traceback."""
    try:
        arguments = flags.FLAGS.read_flags_from_files(argv[1:], force_gnu=False)
        if not any(argument.startswith(("--help", "-help", "--helpfull")) for argument in arguments):
            path, *variant = _config_argument(arguments)
            config = load(path, *variant)
            check_whole(config, path)
            check_overrides(config, arguments)
        return flags.FLAGS(argv)
    except (ConfigError, flags.Error) as error:
        refuse(error)


def _config_argument(arguments: list[str]) -> list[str]:
    """[path] or [path, variant]; the flag must come before its overrides."""
    for position, argument in enumerate(arguments):
        if argument.startswith(("--config.", "-config.", "--noconfig.")):
            raise ConfigError(f"{argument} stands before --config=<file>; put it after")
        if argument in ("--config", "-config") and position + 1 < len(arguments):
            return arguments[position + 1].split(":", 1)
        if argument.startswith(("--config=", "-config=")):
            return argument.partition("=")[2].split(":", 1)
    raise ConfigError("no configuration named; for a start: --config=configs/pretrain.py")


def main(argv: list[str]) -> None:
    if argv[1:]:
        refuse(ConfigError(f"{argv[1]!r} is not understood; options begin with --"))
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # what the libraries tell about themselves hides the progress
    config = CONFIG.value
    if WORKDIR.value is not None:
        config.workdir = WORKDIR.value
    signal.signal(signal.SIGTERM, _terminate)
    try:
        run(config, Path(config.workdir))
    except expected_errors() as error:
        refuse(error)
    except KeyboardInterrupt:
        stopped(config.workdir, 130)
    except SystemExit as request:
        if request.code in (130, 143):
            stopped(config.workdir, request.code)
        raise


def run(config: ConfigDict, workdir: Path) -> None:
    """Prepares JAX for this run, checks and records the configuration, and starts the pipeline.

    Raises ConfigError, and whatever the pipeline raises.
    """
    keep_freed_memory()
    start_processes(config.distributed)
    keep_compiled_programs(workdir)
    module = "opt_jax.pipeline"
    if "task" in config:
        module = "opt_jax.ablation" if config.task == "ablation" else "opt_jax.finetuning"
        validate_downstream(config)
    else:
        validate(config)
    if jax.process_index() == 0:
        make_workdir(workdir)
        if "task" not in config and not (workdir / "config.json").exists():
            write_record(workdir / "config.json", config.to_dict())
        print(describe(config, workdir), flush=True)
    # After the set-up: importing the models may touch the devices.
    importlib.import_module(module).run(config, workdir)


def make_workdir(workdir: Path) -> None:
    """Raises ConfigError where no directory can be made, or none that can be written."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        raise ConfigError(
            f"the workdir {workdir} cannot be used: {error.strerror}; choose another"
        ) from error


def start_processes(distributed: ConfigDict) -> None:
    """Joins the processes of a run on several hosts; a single process has nothing to join.

    distributed: coordinator ('' decides by SLURM's variables, 'auto' asks the cluster that JAX recognises, or
    host:port), num_processes and process_id (for host:port).
    """
    if distributed.coordinator not in ("", "auto"):
        if not 0 <= distributed.process_id < distributed.num_processes:
            raise ConfigError(
                f"config.distributed.process_id is {distributed.process_id}, num_processes is"
                f" {distributed.num_processes}; with a coordinator give both, process_id from 0"
            )
        jax.distributed.initialize(distributed.coordinator, distributed.num_processes, distributed.process_id)
    elif distributed.coordinator == "auto" or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        jax.distributed.initialize()


def keep_compiled_programs(workdir: Path) -> None:
    """A second run, or a resumed one, reads its programs instead of compiling them."""
    directory = str(workdir.absolute() / "compiled")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = directory  # for the processes that build caches
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def describe(config: ConfigDict, workdir: Path) -> str:
    """What is going to happen, and how long it should take."""
    (what, how), stage, steps = planned(config)
    devices = f"{jax.device_count()} x {jax.default_backend()}"
    facts = filter(None, (devices, config.get("precision"), f"seed {config.seed}"))
    lines = [f"{what} in {workdir} ({', '.join(facts)})", how]
    minutes = dict(config.predicted_minutes) | {stage: config.predicted_step_seconds * steps / 60}
    known = {stage: value for stage, value in minutes.items() if value > 0}
    unknown = [stage for stage in minutes if stage not in known]
    if known:
        lines.append(
            "predicted minutes on a quiet 2-core machine, from nothing: "
            + ", ".join(f"{stage} {value:.1f}" for stage, value in known.items())
            + f"; together {sum(known.values()):.0f}"
            + (f" (not measured: {', '.join(unknown)})" if unknown else "")
        )
    return "\n".join(lines)


def planned(config: ConfigDict) -> tuple[tuple[str, str], str, int]:
    """((what is trained, in which way), name of the training's stage, its steps)."""
    if config.get("task") == "ablation":
        number = 1 + len(config.families)
        how = f"{number} pre-trainings of {config.steps} steps: full, without {', '.join(config.families)}"
        return (f"ablation of {config.pretrained}", how), "pretrain", number * config.steps
    work = f"{config.train.steps} steps of {config.train.batch_size}"
    if "task" in config:
        how = f"{work} rows, shown {', '.join(config.inputs)}"
        return (f"{config.task} from {config.pretrained}", how), "finetune", config.train.steps
    model = f"model: {config.model.num_layers} layers, {config.model.hidden_size} wide"
    what = f"OPT pre-training on {config.data.source}"
    return (what, f"{model}; {work} triplets"), "pretrain", config.train.steps


def expected_errors() -> tuple[type[Exception], ...]:
    """Errors whose message tells the user what to do; imported only when something was raised."""
    from opt_jax import checkpoints, window
    from opt_jax.cache.manifest import CacheError
    from opt_jax.data.triplet import SourceError
    from opt_jax.encoders.frozen import FrozenEncoderError
    from opt_jax.encoders.tokenizer import TokenizerError
    from opt_jax.encoders.wav2vec2_batches import NoUsableClipsError
    from opt_jax.state import InitialParametersError
    from opt_jax.tasks.input_sets import InputSetError
    from opt_jax.trained import WorkdirError

    training = (checkpoints.FingerprintMismatch, checkpoints.DamagedCheckpoint, window.NonFiniteError)
    data = (SourceError, CacheError, FrozenEncoderError, TokenizerError, NoUsableClipsError)
    return (ConfigError, StageMismatch, *training, *data, WorkdirError, InputSetError, InitialParametersError)


def refuse(error: Exception) -> None:
    """Ends with the message alone: these errors are about the user's input, not the program's inside."""
    print("\n".join(f"opt_jax: {line}" for line in str(error).splitlines()), file=sys.stderr)
    sys.exit(2)


def stopped(workdir: str, code: int) -> None:
    print(f"opt_jax: interrupted; run the same command again to go on (everything so far is in {workdir})")
    sys.exit(code)


def _terminate(number: int, _) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
