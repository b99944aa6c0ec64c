"""Times the frozen encoders at published sizes beside PyTorch: `python -m opt_jax.benchmark.encoders`.

wav2vec 2.0 base (12 layers of 768) beside transformers', and the Visual Genome detector (ResNet-101, RoIPool,
1,600 classes, 400 attributes, 300 proposals, up to 100 regions) beside the same network in PyTorch. Random
weights, float32, runs in turn; the answers of the two sides are compared as well.
"""

import argparse
import os
import resource
import time
from collections.abc import Callable

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch runs on the same GPU

import jax  # noqa: E402  (after the environment that JAX reads)
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from flax.traverse_util import unflatten_dict  # noqa: E402

from opt_jax.allocator import keep_freed_memory  # noqa: E402
from opt_jax.benchmark.measure import interleaved, middle  # noqa: E402
from opt_jax.benchmark.torch_detector import TorchDetector  # noqa: E402
from opt_jax.convert import faster_rcnn, wav2vec2  # noqa: E402
from opt_jax.convert.table import convert  # noqa: E402
from opt_jax.encoders.faster_rcnn import detect, from_config  # noqa: E402
from opt_jax.encoders.resnet import STAGE_SIZES  # noqa: E402
from opt_jax.encoders.wav2vec2 import SAMPLE_RATE  # noqa: E402
from opt_jax.encoders.wav2vec2_extraction import Extractor  # noqa: E402

OURS, TORCH = "this project", "torch"


def _published(flags):
    import transformers

    return transformers.Wav2Vec2Config(**flags.speech_sizes)


def speech(flags) -> dict[str, Callable[[], np.ndarray]]:
    """Both sides on the same clips: calls that return the context features [B, F, D]."""
    import torch
    import transformers

    published = _published(flags)
    reference = transformers.Wav2Vec2Model(published).eval()
    config = wav2vec2.configuration(published.to_dict())
    arrays = {name: p.detach().numpy() for name, p in reference.named_parameters()}
    shapes = wav2vec2.shapes(config, arrays)
    params = unflatten_dict(convert(arrays, wav2vec2.rows(config), shapes, "random weights"), sep="/")
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    reference.to(device)
    rng = np.random.default_rng(0)
    clips = rng.normal(size=(flags.clips, int(flags.seconds * SAMPLE_RATE))).astype(np.float32)
    lengths = np.full(flags.clips, clips.shape[1], np.int32)
    extractor = Extractor(params, config.model)

    def ours():
        features, counts = extractor.extract(clips, lengths)
        return np.asarray(features)[:, : int(counts[0])]

    @torch.no_grad()
    def theirs():
        x = (clips - clips.mean(1, keepdims=True)) / np.sqrt(clips.var(1, keepdims=True) + 1e-7)
        return reference(torch.tensor(x, device=device)).last_hidden_state.cpu().numpy()

    return {OURS: ours, TORCH: theirs}


def long_recording(flags) -> str:
    """One long clip through wav2vec 2.0 base, in windows: seconds and the most memory so far."""
    config = wav2vec2.configuration(_published(flags).to_dict())
    shapes = wav2vec2.shapes(config, [])
    rng = np.random.default_rng(0)
    flat = {path: rng.normal(size=shape).astype(np.float32) * 0.02 for path, shape in shapes.items()}
    extractor = Extractor(unflatten_dict(flat, sep="/"), config.model)
    clip = rng.normal(size=(1, int(flags.long_seconds * SAMPLE_RATE))).astype(np.float32)
    start = time.perf_counter()
    extractor.extract(clip, np.array([clip.shape[1]]))
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return f"wav2vec 2.0 base, one clip of {flags.long_seconds:g} s: {seconds:.0f} s, at most {peak:.1f} GiB"


def detector(flags) -> dict[str, Callable[[], dict]]:
    """Both sides on the same picture: calls that return the regions."""
    config = faster_rcnn.published(STAGE_SIZES[flags.depth], **flags.detector_sizes)
    model = from_config(config)
    images, boxes = jnp.zeros((1, 64, 64, 3), jnp.uint8), jnp.zeros((1, 1, 4))
    params = jax.jit(model.init)(jax.random.key(0), images, boxes)["params"]
    params = jax.tree_util.tree_map_with_path(_tempered, params)
    image = np.random.default_rng(0).integers(0, 256, (flags.height, flags.width, 3), np.uint8)
    reference = TorchDetector(model, params, "cuda" if jax.default_backend() == "gpu" else "cpu")

    def ours():
        found = jax.device_get(detect(params, image[None], config))
        valid = found.pop("valid")[0]
        return {name: value[0][valid] for name, value in found.items()}

    return {OURS: ours, TORCH: lambda: reference(image)}


def _tempered(path, leaf):
    """Random weights scaled so that nothing grows from block to block, and regions get boxes and classes of
    their own: as many proposals and regions as trained weights give."""
    names = [key.key for key in path]
    if names[-2:] == ["stem", "kernel"]:
        return leaf / 64  # pixels are not divided by their deviation
    if names[-2:] == ["norm3", "scale"]:
        return leaf * 0.2
    if names[0] == "classifier" and names[-1] == "kernel":
        return leaf * 5
    return leaf


def parse(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("opt_jax.benchmark.encoders", description=__doc__)
    add = parser.add_argument
    add("--clips", type=int, default=4)
    add("--seconds", type=float, default=10.0)
    add("--long_seconds", type=float, default=600.0, help="of the clip that goes through in windows")
    add("--depth", type=int, default=101, choices=sorted(STAGE_SIZES), help="of the detector's ResNet")
    add("--height", type=int, default=600)
    add("--width", type=int, default=800)
    add("--repetitions", type=int, default=5)
    add("--only", choices=["speech", "detector"])
    flags = parser.parse_args(arguments)
    flags.speech_sizes, flags.detector_sizes = {}, {}  # smaller ones in tests
    return flags


def main(flags: argparse.Namespace) -> dict[str, float]:
    """Measures, prints, and returns how many times faster this project is, by encoder."""
    import torch

    keep_freed_memory()
    kind = jax.devices()[0].device_kind
    print(
        f"{kind} with {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; float32, jax {jax.__version__},"
    )
    versions = f"torch {torch.__version__} with {torch.get_num_threads()} threads"
    print(f"{versions}; medians of {flags.repetitions} runs in turn")
    ratios = {}
    if flags.only in (None, "speech"):
        print(long_recording(flags))  # first: the others need more memory
    sizes = {
        "speech": f"wav2vec 2.0 base, {flags.clips} clips of {flags.seconds:g} s",
        "detector": f"detector, ResNet-{flags.depth}, a picture of {flags.height} x {flags.width}",
    }
    for name, make in {"speech": speech, "detector": detector}.items():
        if flags.only in (None, name):
            calls = make(flags)
            error = _difference(calls)
            seconds = interleaved(calls, flags.repetitions)
            medians = middle(seconds)
            ratios[name] = medians[TORCH] / medians[OURS]
            print(sizes[name])
            for side, values in seconds.items():
                print(f"  {side:14}{medians[side]:9.3f} s ({min(values):.3f} to {max(values):.3f})")
            print(f"  torch / this project: {ratios[name]:.2f}; {error}")
    return ratios


def _difference(calls) -> str:
    """How far the two answers are apart."""
    ours, theirs = (calls[side]() for side in (OURS, TORCH))
    if isinstance(ours, dict):
        apart = np.abs(ours["boxes"][:, None] - theirs["boxes"]).max(-1)
        mine, other = np.nonzero(apart < 0.1)  # pixels
        counts = f"{len(mine)} of {len(ours['boxes'])} and {len(theirs['boxes'])} regions in common"
        ours, theirs = ours["features"][mine], theirs["features"][other]
        # A box whose edge rounds to another cell pools other values: the median is not about these.
        relative = np.median(np.abs(ours - theirs).max(1)) / np.abs(theirs).max()
        return f"{counts}, the features of the median one differ by {relative:.0e} of the largest at most"
    relative = np.abs(ours - theirs).max() / np.abs(theirs).max()
    return f"features differ by {relative:.0e} of the largest at most"


if __name__ == "__main__":
    main(parse())
