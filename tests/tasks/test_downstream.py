"""The rows of a split that a task is measured on."""

import types

import numpy as np

from opt_jax.tasks.classification import Classification


class Cache(dict):
    """What a task asks of a cache: which modalities each row has, and its labels."""


def task(kind, count=100):
    cache = Cache({row: {"labels": [row // 10] if row % 3 else []} for row in range(count)})
    cache.presence = np.ones((count, 3), bool)
    cache.presence[::10, 1] = False
    made = object.__new__(Classification)
    made.config = types.SimpleNamespace(data=types.SimpleNamespace(kind=kind))
    made.loaders = {"test": types.SimpleNamespace(cache=cache)}
    made.sets, made.target = np.array([[False, True, False], [False, False, True]]), ("text",)
    return made


def test_of_a_source_rows_are_drawn_from_all_of_it():
    usable = [row for row in range(100) if row % 10]
    drawn = task("source").rows("test", 30).tolist()
    assert len(set(drawn)) == 30 and set(drawn) <= set(usable)
    assert max(drawn) > 80 and min(drawn) < 20
    assert drawn == task("source").rows("test", 30).tolist()
    assert task("source").rows("test", None).tolist() == usable
    assert task("pretraining").rows("test", 30).tolist() == usable[:30]


def test_labelled_rows_of_a_source_are_not_of_its_first_classes_only():
    usable = [row for row in range(100) if row % 10 and row % 3]
    drawn = task("source").labelled("test", 30).tolist()
    assert len(set(drawn)) == 30 and set(drawn) <= set(usable)
    assert len({row // 10 for row in drawn}) == 10
    assert task("source").labelled("test", None).tolist() == usable
    assert task("pretraining").labelled("test", 30).tolist() == usable[:30]
