"""The count of operations against PyTorch's own counter, the timing, and the command as a whole."""

import re

import numpy as np
import pytest
from ml_collections import ConfigDict

from opt_jax.benchmark import flops
from opt_jax.benchmark.__main__ import OURS, PRODUCT, main, parse
from opt_jax.benchmark.measure import interleaved, middle, synthetic_batch
from opt_jax.models.opt import Sizes

SIZES = Sizes(50, region_size=24, audio_size=20, num_region_classes=6, num_codes=30, codes_per_image=9)
ROWS, B, LENGTHS = (1, 2, 1), 4, (7, 5, 6)
DECODER = dict(num_layers=2, num_heads=2, mlp_size=48)
MODEL = dict(
    hidden_size=32,
    num_layers=3,
    num_heads=4,
    mlp_size=64,
    dropout=0.1,
    pre_norm=True,
    layer_norm_epsilon=1e-12,
    num_alignment_layers=1,
    alignment_size=8,
    temperature_init=0.07,
    temperature_min=0.01,
    max_text_positions=7,
    max_audio_positions=6,
    frame_window=3,
    text_decoder=DECODER,
    image_decoder=DECODER,
)


def corrupted_by_hand():
    """A batch with the fields of a corrupted one: something of everything is masked, nothing is replaced."""
    batch = synthetic_batch(SIZES, B, LENGTHS)
    batch |= {f"{name}_masked": batch[f"{name}_valid"].copy() for name in ("text", "region", "audio")}
    batch |= {name: batch["present"] for name in ("fused", "clean")}
    return batch | {
        "text_targets": batch["text_ids"],
        "text_history": batch["text_ids"],
        "region_targets": batch["region_features"],
        "audio_targets": batch["audio_features"],
        "text_length": np.full(B, LENGTHS[0]),
        "matching_label": np.zeros(B, np.int32),
        "matching_defined": np.ones((B, 5), bool),
        "replaced": np.zeros((B, 3), bool),
    }


def test_count_of_operations():
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    from opt_jax.benchmark.torch_opt import TorchOPT
    from opt_jax.benchmark.torch_step import losses, to_torch, total_loss

    names = ["mlm", "mvfr", "mrc", "mafr", "macl", "dtr", "dir", "matching", "contrastive"]
    weights = dict.fromkeys(names, 1.0)
    objectives = ConfigDict(dict(macl_temperature=0.1, label_smoothing=0.1))
    donors, found = torch.zeros((1, 3), dtype=torch.int64), torch.ones(1, dtype=torch.bool)
    network, batch = TorchOPT(MODEL, SIZES), to_torch(corrupted_by_hand())
    with FlopCounterMode(display=False) as counter:
        total_loss(losses(network, batch, donors, found, weights, ROWS, objectives), weights).backward()
    counted = counter.get_total_flops()

    # PyTorch computes more than is needed: all pairs where a mask hides some, gradients of masked features,
    # and the similarities of the contrasts, which the count leaves out.
    t, v, a = LENGTHS
    s, d, g = sum(LENGTHS), MODEL["hidden_size"], SIZES.codes_per_image
    hidden_pairs = B * 2 * d * (s * s - (1 + (t - 1) ** 2 + v * v + a * a))
    hidden_pairs += 2 * DECODER["num_layers"] * d * sum(2 * n * n - n * (n + 1) for n in (t - 1, g))
    masked = B * d * (v * SIZES.region_size + a * SIZES.audio_size)
    frames, samples = a * a * SIZES.audio_size, 3 * B * B * MODEL["alignment_size"]
    extra = 6 * hidden_pairs + 2 * masked + 4 * frames + 6 * samples
    assert counted == flops.count(MODEL, SIZES, ROWS, B, LENGTHS) + extra


def test_calls_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = interleaved(calls, 3)
    assert "".join(order) == "aabb" + "ab" * 3
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}
    assert middle({"a": [3.0, 1.0, 2.0]}) == {"a": 2.0}


def test_rows_that_make_no_groups_are_refused():
    with pytest.raises(SystemExit, match="--batch=6 is no multiple of 4"):
        main(parse(["--variant=base", "--batch=6"]))


@pytest.mark.slow
def test_the_whole_command(capsys):
    pytest.importorskip("torch")
    sizes = (
        "--text=8 --regions=4 --frames=6 --region_size=16 --audio_size=8 --vocab_size=60 --region_classes=5"
    )
    rest = (
        "--variant=tiny --batch=4 --codes=20 --codes_per_image=9 --product=64 --repetitions=2 --peak_tflops=1"
    )
    medians = main(parse(f"{sizes} {rest}".split()))
    assert set(medians) == {OURS, PRODUCT, "torch float32", "torch bfloat16 autocast"}
    assert min(medians.values()) > 0
    printed = capsys.readouterr().out
    assert "of 4 rows 1 at token, 2 at modality, 1 at sample level" in printed and "utilisation" in printed


@pytest.mark.slow  # the encoders are compared in tests/parity and tests/convert too
def test_the_encoders_benchmark_runs_and_both_sides_agree(capsys):
    pytest.importorskip("transformers")
    pytest.importorskip("torch")
    from opt_jax.benchmark import encoders

    flags = encoders.parse("--clips=1 --seconds=0.2 --long_seconds=40 --height=96 --width=112".split())
    flags.repetitions, flags.depth = 1, 50
    flags.speech_sizes = dict(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=[8] * 7,
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    flags.detector_sizes = dict(num_classes=5, num_attributes=3, width=4, head_width=8, rpn_width=8)
    ratios = encoders.main(flags)
    assert set(ratios) == {"speech", "detector"} and min(ratios.values()) > 0
    printed = capsys.readouterr().out
    assert "one clip of 40 s" in printed
    differences = [float(found) for found in re.findall(r"differ by (\S+)", printed)]
    assert len(differences) == 2 and max(differences) < 1e-5
    shared, mine, theirs = re.search(r"(\d+) of (\d+) and (\d+) regions in common", printed).groups()
    assert int(mine) == int(theirs) and int(shared) >= int(mine) - 1 > 3
