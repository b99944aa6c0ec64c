"""The benchmark of generation: both sides write every position, and the same words at every one."""

import re

import numpy as np
import pytest

from opt_jax.benchmark import generation
from opt_jax.benchmark.generation import OURS, THEIRS, main, parse
from opt_jax.configuration import load
from opt_jax.models.opt import OPT, Sizes

SIZES = "--variant=tiny --batch=3 --tokens=7 --memory=5 --vocab_size=60 --repetitions=2".split()


@pytest.mark.parametrize("beams", [1, 3])
def test_this_projects_side_writes_every_position(beams):
    flags = parse([*SIZES, f"--beams={beams}"])
    model = OPT(load(flags.config, flags.variant).model.to_dict(), Sizes(60, 1, 1, 1, 1, 1))
    memory = np.random.default_rng(1).standard_normal((3, 5, 192), np.float32)
    write, _ = generation.ours(model, generation.random_params(model), memory, flags)
    ids = write()
    assert ids.shape == (3, 7) and (ids >= 0).all() and (ids < 60).all()  # nothing is NO_WORD
    assert len({tuple(row) for row in ids.tolist()}) == 3  # M is read


def test_alone(capsys):
    medians = main(parse([*SIZES, "--skip_torch"]))
    assert set(medians) == {OURS} and medians[OURS] > 0
    assert "3 texts of 7 tokens from 5 positions, float32, greedy" in capsys.readouterr().out


@pytest.mark.parametrize("beams", [1, 3])
def test_beside_transformers(capsys, beams):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    medians = main(parse([*SIZES, f"--beams={beams}"]))
    assert set(medians) == {OURS, THEIRS} and min(medians.values()) > 0
    printed = capsys.readouterr().out
    assert "21 of 21 tokens are the same" in printed
    mine, theirs = (float(found) for found in re.findall(r"(\S+) M parameters", printed))
    assert mine == theirs


def test_a_variant_that_mbart_cannot_follow_is_refused():
    with pytest.raises(SystemExit, match="base_paper has norms last"):
        main(parse(["--variant=base_paper"]))
