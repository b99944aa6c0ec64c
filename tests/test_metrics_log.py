"""What a run leaves behind to read, and what it prints where there is no terminal."""

import json

import pytest

from opt_jax.metrics_log import MetricsLog, progress, read_metrics


def test_lines_of_an_interrupted_run_are_written_once(tmp_path):
    for name, step in [("a", 2), ("b", 9), ("a", 4)]:
        log = MetricsLog(tmp_path, name, start=step - 1)
        log.write(step, {"total": 1.0 * step})
        log.close()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"name": "a", "st')  # killed while writing
    log = MetricsLog(tmp_path, "a", start=3)
    log.write(4, {"total": float("nan")})
    log.close()
    assert [(line["name"], line["step"], line["total"]) for line in read_metrics(path)] == [
        ("a", 2, 2.0),
        ("b", 9, 9.0),
        ("a", 4, None),
    ]
    assert all("NaN" not in line and json.loads(line) for line in path.read_text().splitlines())
    assert list((tmp_path / "tensorboard/a").iterdir())


def test_nothing_is_written_by_the_other_processes(tmp_path):
    log = MetricsLog(tmp_path, "a", writes=False)
    log.write(1, {"total": 1.0})
    log.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [dict(iterable=3), dict(iterable=[1, 2, 3]), dict(total=3)])
def test_progress_without_a_terminal_prints_lines(arguments, capsys):
    with progress(desc="copying", **arguments) as bar:
        if isinstance(arguments.get("iterable"), list):
            assert list(bar) == [1, 2, 3]
        else:
            bar.update(3)
    printed = capsys.readouterr().err
    assert "\r" not in printed
    assert "copying" in printed and "3/3" in printed
