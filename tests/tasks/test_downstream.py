"""The rows of a split that a task is measured on."""

import types

import numpy as np

from opt_jax.tasks.downstream import Downstream


def rows(kind, limit, count=100):
    presence = np.ones((count, 3), bool)
    presence[::10, 1] = False
    cache = types.SimpleNamespace(presence=presence)
    config = types.SimpleNamespace(data=types.SimpleNamespace(kind=kind))
    loaders = {"test": types.SimpleNamespace(cache=cache)}
    sets = np.array([[False, True, False], [False, False, True]])
    return Downstream.rows(
        types.SimpleNamespace(config=config, loaders=loaders, sets=sets, target=("text",)), "test", limit
    ).tolist()


def test_of_a_source_rows_are_drawn_from_all_of_it():
    usable = [row for row in range(100) if row % 10]
    drawn = rows("source", 30)
    assert len(set(drawn)) == 30 and set(drawn) <= set(usable)
    assert max(drawn) > 80 and min(drawn) < 20
    assert drawn == rows("source", 30)
    for limit in (None, 90, 200):
        assert rows("source", limit) == usable  # nothing to draw
    assert rows("pretraining", 30) == usable[:30]
