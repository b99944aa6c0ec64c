"""Sets of modalities: reading them, and drawing one that a row has."""

import jax
import numpy as np
import pytest

from opt_jax.tasks.input_sets import InputSetError, demand, draw, lettered, named, parse


def test_reading_and_naming():
    sets = parse(("T", "I+A", "T+I+A"))
    assert sets.tolist() == [[True, False, False], [False, True, True], [True, True, True]]
    assert [named(keep) for keep in sets] == ["text", "image_audio", "text_image_audio"]
    assert [lettered(keep) for keep in sets] == ["T", "I+A", "T+I+A"]


@pytest.mark.parametrize("sets", [("X",), ("T+T",), ("",), (), ("T,I",)])
def test_what_cannot_be_read(sets):
    with pytest.raises(InputSetError, match="config.inputs"):
        parse(sets)


def test_draws_follow_the_weights_among_the_sets_that_a_row_has():
    sets = parse(("T", "I", "I+A"))
    present = np.array([[1, 1, 1], [1, 1, 0], [0, 0, 1]], bool)
    for weights in ((1.0, 1.0, 1.0), (4.0, 2.0, 2.0)):
        drawn = np.stack([draw(jax.random.key(i), sets, weights, present) for i in range(600)])
        for row, possible in enumerate(([0, 1, 2], [0, 1], [])):
            counts = [(drawn[:, row] == sets[i]).all(1).sum() for i in range(3)]
            for i in range(3):
                share = weights[i] / sum(weights[j] for j in possible) if i in possible else 0
                assert abs(counts[i] - 600 * share) < 4 * np.sqrt(150) * (i in possible) + 0.5
        assert not drawn[:, 2].any()  # a row without any of them shows nothing


def test_data_without_a_set_are_refused():
    presence = np.array([[True, True, False], [True, False, True]])
    demand(parse(("T+I", "T+A")), presence, "train")
    with pytest.raises(InputSetError, match="train split has image and audio"):
        demand(parse(("I+A",)), presence, "train")
