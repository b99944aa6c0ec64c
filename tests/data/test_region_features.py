"""Regions of other detectors, in the forms in which they are published."""

import base64
import io
import json
import pickle
import zipfile

import numpy as np
import pytest
from raw_files import file_of, picture, sound, tone

from opt_jax.data.region_features import RegionFiles, RegionTable
from opt_jax.data.regions import regions_of
from opt_jax.data.triplet import Source, SourceError, UnusableSampleError

RANDOM = np.random.default_rng(0)
FEATURES = RANDOM.standard_normal((3, 8)).astype(np.float32)
BOXES = np.array([[0, 0, 50, 40], [10.5, 20, 30, 60], [0, 0, 100, 80]], np.float32)
SCORES, CLASSES = np.array([0.2, 0.9, 0.5], np.float32), np.array([3, 0, 1599])
ARRAYS = {"feat": FEATURES, "pred_boxes": BOXES, "scores": SCORES, "pred_classes": CLASSES}
ARRAYS |= {"width": np.array(100), "height": np.array(80)}
BEST = [1, 2, 0]


def files(folder, names=("a", "b", "c"), **captions) -> RegionFiles:
    rows = [{"id": name, "caption": f"A {name}."} | captions.get(name, {}) for name in names]
    (folder / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "npz").mkdir(exist_ok=True)
    for name in names:
        if not (folder / "npz" / f"{name}.npz").exists():
            np.savez(folder / "npz" / f"{name}.npz", **ARRAYS)
    return RegionFiles(folder / "npz", folder / "list.jsonl")


def test_files_of_detectron2(tmp_path):
    (tmp_path / "a.wav").write_bytes(sound(tone(), 16_000))
    (tmp_path / "a.png").write_bytes(file_of(picture()))
    parts = {"features": "b.npz", "audio": "a.wav", "image": "a.png"}
    source = files(tmp_path, a=parts, c={"features": "b"})
    assert isinstance(source, Source) and source.modalities == {"text", "image", "regions", "audio"}
    regions = source[1].regions
    np.testing.assert_array_equal(regions.features, FEATURES[BEST])
    np.testing.assert_array_equal(regions.boxes, BOXES[BEST])
    assert regions.classes.tolist() == [1, 1600, 4] and regions.scores.tolist() == SCORES[BEST].tolist()
    assert (regions.width, regions.height) == (100, 80)
    assert [array.dtype.name for array in vars(regions).values() if isinstance(array, np.ndarray)] == [
        *("float32", "float32", "int32", "float32")
    ]
    assert source[1].image is None and source[1].has_image and source[1].caption == "A b."
    assert source[0].audio is not None and source[0].image is not None and source[0].regions is not None
    assert source.read(1, image=False).regions is None
    assert source.groups[0] != source.groups[1] == source.groups[2]
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source))[1].regions.features, regions.features)


def test_features_of_another_detector_are_another_source(tmp_path):
    before = files(tmp_path).fingerprint()
    assert files(tmp_path).fingerprint() == before
    np.savez(tmp_path / "npz" / "c.npz", **ARRAYS | {"feat": FEATURES + 1})
    assert files(tmp_path).fingerprint() != before


def test_files_of_uniter(tmp_path):
    (tmp_path / "npz").mkdir()
    relative = np.concatenate([BOXES / [100, 80, 100, 80], np.zeros((3, 2))], 1).astype(np.float16)
    soft = np.zeros((3, 6), np.float16)
    soft[[0, 1, 2], [5, 1, 2]] = 0.4
    soft[:, 0] = 0.6  # the background
    arrays = {"features": FEATURES.astype(np.float16), "norm_bb": relative, "conf": SCORES.astype(np.float16)}
    np.savez_compressed(tmp_path / "npz" / "a.npz", **arrays, soft_labels=soft, allow_pickle=True)
    regions = files(tmp_path)[0].regions
    np.testing.assert_array_equal(regions.features, FEATURES[BEST].astype(np.float16))
    np.testing.assert_allclose(regions.boxes, BOXES[BEST] / [100, 80, 100, 80], atol=1e-3)
    assert regions.classes.tolist() == [1, 2, 5] and (regions.width, regions.height) == (1, 1)


def test_without_scores_and_classes_the_order_stays(tmp_path):
    (tmp_path / "npz").mkdir()
    arrays = {"x": FEATURES, "bbox": BOXES, "image_w": 100, "image_h": 80, "num_bbox": 3}
    np.savez_compressed(tmp_path / "npz" / "a.npz", **arrays, info={"pickled": "never looked at"})
    regions = files(tmp_path)[0].regions
    np.testing.assert_array_equal(regions.features, FEATURES)
    assert regions.classes.tolist() == [1, 1, 1] and regions.scores.tolist() == [1, 1, 1]


def changed(array, place, value):
    array = array.copy()
    array[place] = value
    return array


@pytest.mark.parametrize(
    "arrays, reason",
    [
        ({"feat": None}, "lack the array features"),
        ({"pred_boxes": None}, "lack the array boxes"),
        ({"width": None}, "lack the array width"),
        ({"feat": FEATURES[0]}, r"have features of float32 \[8\], expected numbers"),
        ({"feat": FEATURES[:0]}, "are 0 regions of 8 numbers"),
        ({"feat": np.zeros((1001, 1), np.float16)}, "are 1001 regions of 1 numbers, not 1 to 1000"),
        ({"feat": np.zeros((1, 16_385), np.float16)}, "are 1 regions of 16385 numbers"),
        ({"feat": FEATURES[:2]}, r"have boxes of float32 \[3, 4\], expected numbers \[2, 4\]"),
        ({"feat": FEATURES.astype("S4")}, r"have features of \|S4"),
        ({"feat": FEATURES.astype(complex)}, "have features of complex128"),
        ({"feat": changed(FEATURES, (1, 1), np.nan)}, "have features that are not finite"),
        ({"feat": changed(FEATURES.astype(float), 0, 1e300)}, "have features that are not finite"),
        ({"feat": np.array([{}], object)}, "cannot be read: Object arrays cannot be loaded"),
        ({"pred_boxes": changed(BOXES, 0, np.inf)}, "have boxes that are not finite"),
        ({"pred_boxes": BOXES * 2}, "have boxes beyond the picture of 100 x 80"),
        ({"pred_boxes": BOXES[:, ::-1]}, "beyond|right or bottom edge comes before"),
        ({"scores": SCORES[:2]}, r"have scores of float32 \[2\]"),
        ({"scores": changed(SCORES, 0, np.nan)}, "have scores that are not finite"),
        ({"pred_classes": CLASSES - 1}, "have classes from -1 to 1598"),
        ({"pred_classes": changed(CLASSES.astype(float), 0, np.nan)}, "have classes that are not finite"),
        ({"width": 0}, "are of a picture of 0 x 80 pixels"),
        ({"width": np.array([100])}, r"have width of int64 \[1\]"),
        ({"height": 10**8}, "are of a picture of 100 x 100000000 pixels"),
    ],
)
def test_arrays_that_are_refused(tmp_path, arrays, reason):
    (tmp_path / "npz").mkdir()
    arrays = {name: array for name, array in (ARRAYS | arrays).items() if array is not None}
    np.savez(tmp_path / "npz" / "b.npz", **arrays)
    assert_only_b_is_bad(files(tmp_path), reason)


def assert_only_b_is_bad(source, reason):
    with pytest.raises(UnusableSampleError, match=f"sample 'b': features .*({reason})"):
        source[1]
    assert source[0].regions is not None and source[2].regions is not None


@pytest.mark.parametrize(
    "arrays, reason",
    [
        ({"relative_boxes": np.zeros((3, 3))}, "relative boxes of 3 numbers"),
        ({"relative_boxes": BOXES}, "beyond the picture of 1 x 1"),
        ({"relative_boxes": np.zeros((3, 4)), "soft_labels": np.ones((3, 1))}, "of the background alone"),
    ],
)
def test_relative_boxes_that_are_refused(arrays, reason):
    with pytest.raises(UnusableSampleError, match=reason):
        regions_of({"features": FEATURES} | arrays, "b")


def header_only(shape) -> bytes:
    """An npz whose only array claims a shape and holds nothing."""
    array, content = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(array, {"descr": "<f4", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("feat.npy", array.getvalue())
    return content.getvalue()


def bomb() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("feat.npy", bytes(140 << 20))
    return content.getvalue()


@pytest.mark.parametrize(
    "content, reason",
    [
        (lambda whole: whole[:-30], "File is not a zip file"),
        (lambda whole: whole[: len(whole) // 2], "File is not a zip file"),
        (lambda whole: b"", "File is not a zip file"),
        (lambda whole: whole.replace(FEATURES.tobytes(), bytes(FEATURES.nbytes)), "Bad CRC-32"),
        (lambda whole: header_only((10**6, 10**6)), "cannot be read"),
        (lambda whole: header_only((1000, 16)), "cannot be read"),
        (lambda whole: bomb(), "feat.npy has over 125 MiB"),
        (lambda whole: pickle.dumps(ARRAYS), "File is not a zip file"),
    ],
)
def test_files_that_are_refused(tmp_path, content, reason):
    whole = io.BytesIO()
    np.savez(whole, **ARRAYS)
    (tmp_path / "npz").mkdir()
    (tmp_path / "npz" / "b.npz").write_bytes(content(whole.getvalue()))
    assert_only_b_is_bad(files(tmp_path), reason)


@pytest.mark.parametrize(
    "name, reason", [("../x", "leaves the folder"), ("none", "cannot be read in"), (3, "is 3")]
)
def test_names_of_files_that_are_refused(tmp_path, name, reason):
    assert_only_b_is_bad(files(tmp_path, b={"features": name}), reason)


def encoded(array) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def cells(name, **changes) -> list[str]:
    row = {"id": name, "width": "100", "height": "80", "count": "3", "boxes": encoded(BOXES)}
    return list((row | {"features": encoded(FEATURES)} | changes).values())


def table(folder, *rows) -> RegionTable:
    (folder / "list.tsv").write_text("id\tcaption\tfeatures\na\tA.\t25\nb\tB.\t\nc\tC.\t25\n")
    (folder / "table.tsv").write_text("".join("\t".join(row) + "\r\n" for row in rows))
    return RegionTable(folder / "table.tsv", folder / "list.tsv")


def test_a_table_of_bottom_up_attention(tmp_path):
    flipped = cells("b", features=encoded(-FEATURES))
    source = table(tmp_path, cells("1"), flipped, cells("25"), cells("b"))
    assert isinstance(source, Source) and len(source) == 3
    regions = source[1].regions
    np.testing.assert_array_equal(regions.features, -FEATURES)  # the first row of that name
    np.testing.assert_array_equal(source[2].regions.boxes, BOXES)
    assert regions.scores.tolist() == [1, 1, 1] and (regions.width, regions.height) == (100, 80)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source))[1].regions.features, -FEATURES)
    assert source.fingerprint() != table(tmp_path, flipped, cells("25")).fingerprint()


def test_a_table_of_lxmert(tmp_path):
    def row(name):
        kinds = [encoded(CLASSES.astype(np.int64)), encoded(SCORES), "", ""]
        return [name, "80", "100", *kinds, "3", f"b'{encoded(BOXES)}'", encoded(FEATURES)]

    regions = table(tmp_path, row("25"), row("b"))[0].regions
    np.testing.assert_array_equal(regions.features, FEATURES[BEST])
    assert regions.classes.tolist() == [1, 1600, 4] and (regions.width, regions.height) == (100, 80)


@pytest.mark.parametrize(
    "row, reason",
    [
        (cells("b")[:5], "it has 5 cells, expected 6"),
        (cells("b", features="@@@"), "of row 'b': .*base64"),
        (cells("b", features=encoded(FEATURES)[:-6]), "padding"),
        (cells("b", features=encoded(FEATURES.ravel()[:-1])), "its features are 23 numbers for 3 regions"),
        (cells("b", features=encoded(FEATURES)[:44] + "A" * 16), "features are|buffer size"),
        (cells("b", features=""), "are 3 regions of 0 numbers"),
        (cells("b", features=encoded(changed(FEATURES, 0, np.nan))), "features that are not finite"),
        (cells("b", boxes=encoded(BOXES[:, :2])), r"have boxes of float32 \[3, 2\]"),
        (cells("b", count="0"), "it has 0 regions, not 1 to 1000"),
        (cells("b", count="100000000000"), "regions, not 1 to 1000"),
        (cells("b", count="three"), "invalid literal for int"),
        (cells("b", width="-3"), "are of a picture of -3 x 80"),
        (cells("B"), "there is none in table.tsv"),
    ],
)
def test_rows_of_a_table_that_are_refused(tmp_path, row, reason):
    assert_only_b_is_bad(table(tmp_path, cells("25"), row, cells("x")), reason)


def test_an_empty_table_and_missing_files(tmp_path):
    source = table(tmp_path)
    with pytest.raises(UnusableSampleError, match="'a': features of row '25': there is none"):
        source[0]
    with pytest.raises(SourceError, match="none is no folder"):
        RegionFiles(tmp_path / "none", tmp_path / "list.tsv")
    with pytest.raises(SourceError, match="none.tsv cannot be read"):
        RegionTable(tmp_path / "none.tsv", tmp_path / "list.tsv")
