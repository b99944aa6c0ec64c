"""Rows, places and the list of differences."""

import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from opt_jax.convert.table import ConversionError, Row, convert, layer

SHAPES = {"stack/kernel": (2, 3, 4), "stack/parts": (2, 5, 2), "bias": (3,)}
ROWS = [
    Row(r"layers\.(\d+)\.weight", "stack/kernel", np.transpose, layer),
    Row(r"layers\.(\d+)\.first", "stack/parts", place=lambda match: (int(match[1]), None, 0)),
    Row(r"layers\.(\d+)\.second", "stack/parts", place=lambda match: (int(match[1]), None, 1)),
    Row(r"(b)ias", r"\1ias"),
    Row(r"position_ids", None),
]


def arrays():
    rng = np.random.default_rng(0)
    named = {f"layers.{i}.weight": rng.normal(size=(4, 3)) for i in range(2)}
    named |= {f"layers.{i}.{part}": rng.normal(size=5) for i in range(2) for part in ("first", "second")}
    return named | {"bias": rng.normal(size=3), "position_ids": np.arange(9)}


def differences(given):
    with pytest.raises(ConversionError) as error:
        convert(given, ROWS, SHAPES, "a file")
    return error.value.differences


def test_every_array_goes_to_its_place():
    given = arrays()
    tree = unflatten_dict(convert(given, ROWS, SHAPES, "a file"), sep="/")
    assert set(tree) == {"stack", "bias"}
    for i in range(2):
        np.testing.assert_array_equal(tree["stack"]["kernel"][i], given[f"layers.{i}.weight"].T)
        np.testing.assert_array_equal(tree["stack"]["parts"][i, :, 1], given[f"layers.{i}.second"])
    np.testing.assert_array_equal(tree["bias"], given["bias"])


def test_all_that_does_not_fit_is_told_at_once():
    given = arrays() | {
        "extra": np.zeros(2),
        "layers.0.weight": np.zeros((4, 2)),
        "layers.2.first": np.zeros(5),
    }
    del given["bias"], given["layers.1.second"]
    found = differences(given)
    assert found == [
        "extra [2] is unknown",
        "layers.0.weight [4, 2] gives [2, 4], but stack/kernel [2, 3, 4] has room for [3, 4]",
        "layers.2.first [5] is beyond stack/parts [2, 5, 2]",
        "for stack/kernel [2, 3, 4] there is 12 of its 24 numbers",
        "for stack/parts [2, 5, 2] there is 15 of its 20 numbers",
        "for bias [3] there is nothing",
    ]


def test_parameters_are_floats_as_wide_as_the_widest_of_their_arrays():
    given = arrays()
    given["layers.0.weight"] = given["layers.0.weight"].astype(np.float16)
    parameters = convert(given, ROWS, SHAPES, "a file")
    assert parameters["stack/kernel"].dtype == np.float64
    np.testing.assert_array_equal(parameters["stack/kernel"][1], given["layers.1.weight"].T)
    found = differences(given | {"bias": np.arange(3), "layers.1.first": np.ones(5, bool)})
    assert found[:2] == [
        "bias [3] holds int64, and parameters are floats",
        "layers.1.first [5] holds bool, and parameters are floats",
    ]


def test_two_arrays_for_one_place():
    rows = [*ROWS, Row("other", "bias")]
    with pytest.raises(ConversionError, match=r"other \[3\] and bias are both for bias"):
        convert(arrays() | {"other": np.zeros(3)}, rows, SHAPES, "a file")


def test_the_message_names_the_source_and_ten_differences():
    given = arrays() | {f"unknown{i:02}": np.zeros(1) for i in range(15)}
    with pytest.raises(ConversionError) as error:
        convert(given, ROWS, SHAPES, "some/file.bin")
    lines = str(error.value).splitlines()
    assert lines[0] == "some/file.bin: 15 differences" and len(lines) == 12
    assert lines[-1].strip() == "and 5 more" and len(error.value.differences) == 15
