"""The benchmark's command line; `python -m opt_jax.benchmark --help` lists the flags."""

import argparse
import os
from pathlib import Path

# JAX would otherwise take most of a GPU's memory, and PyTorch runs on the same one.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import flax  # noqa: E402  (after the environment that JAX reads)
import jax  # noqa: E402

from opt_jax.allocator import keep_freed_memory  # noqa: E402
from opt_jax.benchmark import flops  # noqa: E402
from opt_jax.benchmark.measure import (  # noqa: E402
    Step,
    corrupted,
    interleaved,
    make_task,
    matrix_product,
    middle,
    synthetic_batch,
)
from opt_jax.configuration import load  # noqa: E402
from opt_jax.models.opt import Sizes  # noqa: E402

OURS, PRODUCT = "this project's step", "JAX matrix product"
CONFIG = Path(__file__).parents[2] / "configs" / "pretrain.py"


def parse(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("opt_jax.benchmark", description=__doc__)
    add = parser.add_argument
    add("--variant", default="base", help="of the configuration")
    add("--config", default=str(CONFIG), help="a configuration file like configs/pretrain.py")
    add("--batch", type=int, default=16, help="triplets in a step")
    add("--repetitions", type=int, default=5)
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="of this project's step")
    add("--text", type=int, default=30, help="text positions, [CLS] and [SEP] included")
    add("--regions", type=int, default=36)
    add("--frames", type=int, default=60, help="audio positions")
    add("--region_size", type=int, default=2048, help="width of a region's feature")
    add("--audio_size", type=int, default=768, help="width of an audio position's feature")
    add("--vocab_size", type=int, default=30522)
    add("--region_classes", type=int, default=1600, help="without background")
    add("--codes", type=int, default=8192, help="of the picture codebook")
    add("--codes_per_image", type=int, default=64)
    add("--unroll", type=int, default=0, help="layers in one turn of the loop over layers; 0: as configured")
    add("--product", type=int, default=4096, help="size of the matrix product")
    add("--peak_tflops", type=float, default=0.0, help="the device's peak, to report model-FLOPs utilisation")
    add("--skip_torch", action="store_true")
    return parser.parse_args(arguments)


def main(flags: argparse.Namespace) -> dict[str, float]:
    """Measures, prints the table, and returns median seconds by name."""
    keep_freed_memory()  # as the training does; PyTorch, in the same process, gains from it too
    config = load(flags.config, flags.variant)
    config.precision = flags.dtype
    config.model.unroll = flags.unroll or config.model.unroll
    sizes = Sizes(
        vocab_size=flags.vocab_size,
        region_size=flags.region_size,
        audio_size=flags.audio_size,
        num_region_classes=flags.region_classes,
        num_codes=flags.codes,
        codes_per_image=flags.codes_per_image,
    )
    rows = tuple(config.objectives.rows[name] for name in ("token", "modality", "sample"))
    if flags.batch % sum(rows):
        raise SystemExit(f"--batch={flags.batch} is no multiple of {sum(rows)}, the rows of a group {rows}")
    lengths = (flags.text, flags.regions, flags.frames)
    batch = synthetic_batch(sizes, flags.batch, lengths)
    task = make_task(config, sizes, lengths)
    step = Step(task, config.train, batch)
    calls = {OURS: step, PRODUCT: matrix_product(flags.product, flags.dtype)}

    versions = f"jax {jax.__version__}, flax {flax.__version__}"
    if not flags.skip_torch:
        from opt_jax.benchmark import torch_step

        names = dict(float32="torch float32", bfloat16="torch bfloat16 autocast")
        device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        prepared = (*corrupted(task, batch, rows), step.state.params)
        steps = torch_step.make_steps(config, sizes, task.weights, *prepared, tuple(names), device)
        calls |= {names[precision]: steps[precision] for precision in names}
        versions += f", {torch_step.describe()}"

    kind = jax.devices()[0].device_kind
    print(f"{kind} with {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {versions}")
    print(f"variant {flags.variant}: {step.num_parameters() / 1e6:.1f} M parameters, JAX in {flags.dtype}")
    print("{} triplets of {} text + {} image + {} audio positions".format(flags.batch, *lengths))
    print("of {} rows {} at token, {} at modality, {} at sample level".format(sum(rows), *rows))
    print(f"dropout {config.model.dropout}, unroll {config.model.unroll}, remat {config.model.remat}")
    seconds = interleaved(calls, flags.repetitions)
    report(seconds, flags, flops.count(config.model, sizes, rows, flags.batch, lengths))
    return middle(seconds)


def report(seconds: dict[str, list[float]], flags, operations: float) -> None:
    """Prints the table; `operations` are those of the matrix products that one step needs."""
    medians = middle(seconds)
    done = dict.fromkeys(seconds, operations) | {PRODUCT: 2.0 * flags.product**3}
    rate = {name: done[name] / medians[name] for name in seconds}
    print(f"a step needs {operations / 1e9:.0f} GFLOP; medians of {flags.repetitions} interleaved runs")
    for name, values in seconds.items():
        spread = f"({min(values):.3f} to {max(values):.3f})"
        print(f"  {name:25}{medians[name]:9.3f} s {spread:20}{rate[name] / 1e9:9.0f} GFLOP/s")
    for name in medians:
        if name.startswith("torch"):
            print(f"  {name} / {OURS}: {medians[name] / medians[OURS]:.2f}")
    print(f"  {OURS}, share of the matrix product's rate: {rate[OURS] / rate[PRODUCT]:.1%}")
    if flags.peak_tflops:
        share = rate[OURS] / flags.peak_tflops / 1e12
        print(f"  model-FLOPs utilisation of {flags.peak_tflops:g} TFLOP/s: {share:.1%}")


if __name__ == "__main__":
    main(parse())
