"""What Spoken Scenes show and say, checked without their own geometry code."""

import re

import numpy as np
import pytest

from opt_jax.data.spoken_scenes import record
from opt_jax.data.spoken_scenes.render import render
from opt_jax.data.spoken_scenes.scene import COLOURS, SHAPES, Scene, SceneObject, draw_scene
from opt_jax.data.spoken_scenes.sentences import describe, describe_for_split, split_of
from opt_jax.data.spoken_scenes.speech import resample, trim_silence
from opt_jax.data.triplet import Triplet

RELATION = r"(to the left of|to the right of|above|below)"
PLACE = r"((?:on|at|in) the (?:left|right|top|bottom|middle|(?:top|bottom) (?:left|right) corner))"
# Sentence forms with noun phrases replaced by 0, 1, 2, and the claims they make of their groups.
FORMS = [
    (rf"0 (?:is )?{RELATION} 1", lambda r: [(r, 0, 1)]),
    (rf"0 is {RELATION} 1 and {RELATION} 2", lambda r, s: [(r, 0, 1), (s, 0, 2)]),
    (rf"0 and 1 are {RELATION} 2", lambda r: [(r, 0, 2), (r, 1, 2)]),
    (rf"0 {RELATION} 1 and 2", lambda r: [(r, 0, 1), (r, 0, 2)]),
    (rf"0 (?:is )?{RELATION} 1 and 2 (?:is )?{PLACE}", lambda r, p: [(r, 0, 1), (p, 2)]),
    (rf"0 (?:is )?{PLACE}", lambda p: [(p, 0)]),
    (rf"0 (?:is )?{PLACE} and 1 (?:is )?{PLACE}", lambda p, q: [(p, 0), (q, 1)]),
    (rf"0 {PLACE} with 1 and 2", lambda p: [(p, 0)]),
    (rf"{PLACE} 0", lambda p: [(p, 0)]),
    (rf"{PLACE} 0 and {PLACE} 1", lambda p, q: [(p, 0), (q, 1)]),
    (r"0(?: and 1)?(?: and 2)?", lambda: []),
]


def _parse(sentence):
    """Noun phrases as sets of words, and the claims about them."""
    phrases = []

    def number(match):
        phrases.append(set(match.group(1).split()))
        return str(len(phrases) - 1)

    plain = re.sub(rf"\ban? ((?:\w+ )*?(?:{'|'.join(SHAPES)}|shape))\b", number, sentence)
    plain = re.sub(r"there is |the picture shows ", "", plain)
    for pattern, claims in FORMS:
        if match := re.fullmatch(pattern, plain):
            return phrases, claims(*match.groups())
    raise AssertionError(f"unknown form: {plain!r} from {sentence!r}")


def _holds(claim, boxes, size):
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    if len(claim) == 3:
        dx, dy = centres[claim[1]] - centres[claim[2]]
        value, other = (dy, dx) if claim[0] in ("above", "below") else (dx, dy)
        negative = "left" in claim[0] or claim[0] == "above"
        return (value < 0) == negative and abs(value) > abs(other)
    x, y = centres[claim[1]] / size
    words = claim[0].split()
    inside = {"left": x < 0.4, "right": x > 0.6, "top": y < 0.4, "bottom": y > 0.6}
    inside["middle"] = 0.32 < x < 0.68 and 0.32 < y < 0.68
    return all(inside[word] for word in words if word in inside)


def test_sentences_are_true():
    rng = np.random.default_rng(0)
    forms, counts = set(), []
    for _ in range(600):
        scene = draw_scene(rng, 128)
        sentence, named = describe(rng, scene)
        phrases, claims = _parse(sentence)
        assert 4 <= len(sentence.split()) <= 16
        assert len(phrases) == len(named) == len(set(named))
        counts.append(len(named))
        forms.add(re.sub(r"\b(small|large|shape|" + "|".join([*COLOURS, *SHAPES]) + r")\b", "", sentence))
        words = [{o.size, o.colour, o.shape, "shape"} for o in scene.objects]
        orders = [
            order
            for order in _orders(named)
            if all(phrase <= words[i] for phrase, i in zip(phrases, order, strict=True))
        ]
        boxes = scene.boxes()
        assert any(all(_holds(c, boxes[list(order)], 128) for c in claims) for order in orders), sentence
    assert len(forms) > 30  # varied
    assert np.bincount(counts, minlength=4)[1:].min() > 60


def _orders(items):
    if not items:
        return [()]
    return [(item, *rest) for item in items for rest in _orders([i for i in items if i != item])]


def test_the_checker_sees_false_claims():
    boxes = np.array([[10.0, 10, 30, 30], [80, 12, 100, 32]])
    assert _holds(("to the left of", 0, 1), boxes, 128) and not _holds(("to the left of", 1, 0), boxes, 128)
    assert not _holds(("above", 0, 1), boxes, 128)
    assert _holds(("in the top right corner", 1), boxes, 128) and not _holds(("at the bottom", 1), boxes, 128)


def test_splits_are_disjoint_and_stable():
    rng = np.random.default_rng(1)
    for split in ("train", "validation", "test"):
        for _ in range(10):
            sentences = describe_for_split(rng, draw_scene(rng, 128), split, 3)
            assert sentences is None or {split_of(s) for s, _ in sentences} == {split}
    # A change of the hash would move sentences between splits of data made before and after it.
    sentences = ["there is a pink cross", "there is a red ring", "a red ring is in the middle"]
    assert [split_of(sentence) for sentence in sentences] == ["train", "validation", "train"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("angle", [0.0, 11.0])
def test_boxes_are_tight(shape, angle):
    obj = SceneObject(shape, "black", "large", 60.3, 52.7, 20.0, angle)
    image = render(np.random.default_rng(0), Scene(128, (obj,))).astype(float)
    rows, columns = np.nonzero(image.mean(axis=2) < 150)
    found = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    box = np.array(obj.box())
    assert (found[:2] > box[:2] - 1).all() and (found[2:] < box[2:] + 1).all()  # enclosed
    assert np.abs(found - box).max() < 2.5  # a star's thin tips fade
    assert image[53, 60].mean() > 200 if shape == "ring" else image[53, 60].mean() < 60


def test_scenes_are_well_formed():
    rng = np.random.default_rng(2)
    for size in (64, 128):
        counts = []
        for _ in range(150):
            scene = draw_scene(rng, size)
            boxes = scene.boxes()
            assert boxes.min() >= 0 and boxes.max() <= size
            assert len(set(scene.classes().tolist())) == len(boxes)
            extents = (boxes[:, 2:] - boxes[:, :2]).max(axis=1) / size
            for obj, extent in zip(scene.objects, extents, strict=True):
                assert extent < 0.24 if obj.size == "small" else extent > 0.24
            for i in range(len(boxes)):
                for j in range(i):
                    a, b = boxes[i], boxes[j]
                    assert (a[2:] <= b[:2]).any() or (b[2:] <= a[:2]).any()
            counts.append(len(boxes))
        assert set(counts) == {1, 2, 3, 4, 5} and np.mean(np.array(counts) >= 2) > 0.85


def test_record_round_trip():
    rng = np.random.default_rng(3)
    sample = Triplet(
        id="test-000001",
        image=rng.integers(0, 256, (16, 16, 3), dtype=np.uint8),
        caption="there is a red ring",
        audio=rng.uniform(-0.9, 0.9, 4000).astype(np.float32),
        references=("there is a red ring", "a red ring is in the middle"),
        labels=(40,),
        boxes=np.array([[1.5, 2, 9, 10]], np.float32),
        classes=np.array([41], np.int32),
        named=(0,),
        speaker="en-us+m1",
    )
    data = record.encode(sample)
    back = record.decode(data)
    for field in ("id", "caption", "references", "labels", "named", "speaker"):
        assert getattr(back, field) == getattr(sample, field)
    for field in ("image", "boxes", "classes"):
        value, expected = getattr(back, field), getattr(sample, field)
        assert np.array_equal(value, expected) and value.dtype == expected.dtype
    assert back.audio.dtype == np.float32
    assert np.abs(back.audio - sample.audio).max() < 1e-4  # 16 bits
    assert record.decode(data, image=False, audio=False).image is None


@pytest.mark.parametrize("rates", [(22050, 16000), (8000, 16000), (16000, 16000)])
def test_resampling_agrees_with_scipy(rates):
    signal = pytest.importorskip("scipy.signal")
    for length in (1, 440, 5003):
        waveform = np.random.default_rng(length).normal(size=length).astype(np.float32)
        divisor = np.gcd(*rates)
        expected = signal.resample_poly(waveform.astype(np.float64), rates[1] // divisor, rates[0] // divisor)
        found = resample(waveform, *rates)
        assert found.shape == expected.shape and found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_trim_silence_keeps_fifty_milliseconds():
    waveform = np.zeros(16_000, np.float32)
    waveform[5000:9000] = 0.5
    trimmed = trim_silence(waveform)
    assert len(trimmed) == 4000 + 2 * 800 and trimmed[799] == 0 and trimmed[800] == 0.5
