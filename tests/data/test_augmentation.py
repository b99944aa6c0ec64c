"""Augmented copies: what is changed, by how much, and that every row is always the same."""

import numpy as np
import pytest

from opt_jax.data.augmentation import SPEEDS, Augmented, moved, with_copies
from opt_jax.data.triplet import Regions, Triplet


def tone(seconds=1.0, frequency=440.0):
    return (0.3 * np.sin(2 * np.pi * frequency * np.arange(int(16000 * seconds)) / 16000)).astype(np.float32)


class Rows:
    class_names, modalities = ("a", "b"), ("text", "image", "audio", "regions")

    def __init__(self):
        image = np.full((40, 60, 3), 200, np.uint8)
        image[15:25, 25:35] = (10, 60, 110)
        box = np.zeros((1, 4), np.float32)
        ready = Regions(np.ones((1, 2)), box, np.ones(1, np.int32), np.ones(1), 60, 40)
        self.rows = [
            Triplet("x", image=image, caption="one", audio=tone(), labels=(1,), boxes=box, named=(0,)),
            Triplet("y", caption="two"),
            Triplet("z", image=image, regions=ready, caption="three"),
        ]

    def __len__(self):
        return 3

    def read(self, index, image=True, audio=True):
        return self.rows[index]

    def caption(self, index):
        return self.rows[index].caption

    def rows_with(self, *parts):
        return np.array([0]) if "audio" in parts else np.arange(3)

    def origin(self, index):
        return "rows"

    def fingerprint(self):
        return {"source": "rows"}


def test_own_rows_come_first_and_copies_keep_what_is_said():
    source = Augmented(Rows(), 2, seed=0)
    assert len(source) == 9
    assert source[0] is source.source.rows[0]
    ids = [source[i].id for i in range(9)]
    assert ids == ["x", "y", "z", "x~1", "y~1", "z~1", "x~2", "y~2", "z~2"]
    assert [source.caption(i) for i in range(9)] == [source[i].caption for i in range(9)]
    assert source[6].labels == (1,) and source[6].boxes is None and source[6].named == ()
    np.testing.assert_array_equal(source.rows_with("audio"), [0, 3, 6])
    np.testing.assert_array_equal(source.rows, [0, 1, 2] * 3)
    assert source[4].image is None and source[4].audio is None
    assert source[5].image is source[2].image  # what a detector saw of it would not be moved
    with pytest.raises(IndexError):
        source[9]


def test_a_row_is_always_the_same_and_unlike_others():
    source = Augmented(Rows(), 2, seed=0)
    for field in ("image", "audio"):
        one, again, other = (getattr(source[i], field) for i in (3, 3, 6))
        np.testing.assert_array_equal(one, again)
        assert one.shape != other.shape or (one != other).any()
    elsewhere = Augmented(Rows(), 2, seed=1)
    assert (elsewhere[3].image != source[3].image).any()
    prints = [Augmented(Rows(), c, s).fingerprint() for c, s in ((2, 0), (3, 0), (2, 1))]
    assert len({str(p) for p in prints}) == 3


def test_pictures_move_as_told_and_their_edges_go_on():
    image = Rows().rows[0].image
    np.testing.assert_array_equal(moved(image, 0.5, 0.5, 0.5, 0.5), image)

    def middle(picture):
        dark = np.argwhere(picture[..., 0] < 105)
        return dark.mean(0), len(dark)

    (y, x), area = middle(image)
    shifted, _ = middle(moved(image, 0.5, 0.5, 1.0, 0.5))
    np.testing.assert_allclose(shifted, (y, x + 0.04 * 60), atol=0.5)
    shifted, _ = middle(moved(image, 0.5, 0.5, 0.5, 0.0))
    np.testing.assert_allclose(shifted, (y - 0.08 * 40, x), atol=0.5)
    assert middle(moved(image, 1.0, 0.5, 0.5, 0.5))[1] / area == pytest.approx(1.12**2, rel=0.15)
    corners = [moved(image, s, a, 1.0, 1.0)[c] for s in (0, 1) for a in (0, 1) for c in ((0, 0), (-1, -1))]
    assert (np.array(corners) == 200).all()


def test_speech_is_faster_or_slower_with_faint_noise():
    source = Augmented(Rows(), 40, seed=0)
    speeds, ratios = [], []
    for copy in range(1, 41):
        audio = source[3 * copy].audio
        speeds.append(16000 / len(audio))
        spectrum = np.abs(np.fft.rfft(audio * np.hanning(len(audio)))) ** 2
        peak = spectrum.argmax()
        assert peak * 16000 / len(audio) == pytest.approx(440 * speeds[-1], rel=0.01)  # pitch goes with it
        tonal = spectrum[peak - 3 : peak + 4].sum()
        ratios.append(10 * np.log10(tonal / (spectrum.sum() - tonal)))
    assert {min(SPEEDS, key=lambda s, v=v: abs(s - v)) for v in speeds} == set(SPEEDS)
    np.testing.assert_allclose([min(abs(s - v) for s in SPEEDS) for v in speeds], 0, atol=1e-3)
    assert 9 < min(ratios) < 15 and 25 < max(ratios) < 31


def test_rows_without_a_caption_have_no_copies():
    rows = Rows()
    rows.rows[1] = Triplet("y", image=rows.rows[0].image, audio=tone())
    rows.rows_with = lambda *parts: np.array([0, 2]) if parts == ("text",) else np.arange(3)
    source = Augmented(rows, 2, seed=0)
    assert [source[i].id for i in range(len(source))] == ["x", "y", "z", "x~1", "z~1", "x~2", "z~2"]
    np.testing.assert_array_equal(source.rows, [0, 1, 2, 0, 2, 0, 2])


def test_what_cannot_be_changed_is_not_copied():
    rows = Rows()
    assert with_copies(rows, 0, 0) is rows
    assert isinstance(with_copies(rows, 1, 0), Augmented)
    rows.modalities = ("text", "regions")
    assert with_copies(rows, 1, 0) is rows


def test_a_strip_that_would_need_gigabytes_stays_as_it_is():
    strip = np.broadcast_to(np.zeros((1, 1, 3), np.uint8), (100, 30_000, 3))
    assert moved(strip, 0.1, 0.1, 0.1, 0.1) is strip
