"""Files and variants that no run can be made of are refused in one line."""

from pathlib import Path

import pytest

from opt_jax import main
from opt_jax.configuration import load

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("ablation.py:tiny", "ablation.py has no variants; leave ':tiny' out"),
        ("encoders/detector.py:bad", "unknown variant 'bad'; did you mean 'base'? (variants: tiny, base)"),
        ("encoders/wav2vec2.py:bad", "(variants: tiny, base, large)"),
        ("encoders/dvae.py", "dvae.py cannot be run: it has no workdir, seed"),
        ("finetune/defaults.py", "defaults.py names no task; choose from those that load it: "),
    ],
)
def test_a_file_that_cannot_be_run_is_refused_in_one_line(named, message, capsys):
    with pytest.raises(SystemExit) as end:
        main.parse_flags(["main", f"--config={CONFIGS / named}"])
    printed = capsys.readouterr().err
    assert end.value.code == 2 and message in printed and len(printed.splitlines()) == 1


def test_every_whole_configuration_can_be_run():
    for path in ("pretrain.py", "ablation.py", "finetune/captioning.py", "finetune/vqa.py"):
        main.check_whole(load(CONFIGS / path), path)
