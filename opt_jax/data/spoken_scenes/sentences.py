"""English sentences about a scene. Everything they say is true of it.

Lower case and no punctuation, as in a speech transcript. The stock of function words is small on purpose, so
that independent sentences about one picture share word sequences.
"""

import hashlib

import numpy as np

from opt_jax.data.spoken_scenes.scene import Scene, SceneObject, region, relation

MAX_WORDS = 16
SPLITS = ("train", "validation", "test")
# Shares of the hash space, in hundredths: 60 train, 20 validation, 20 test.
_BUCKET_ENDS = (60, 80, 100)
_RELATIONS = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
_SIDES = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}
_COUNT_CUMULATIVE = (0.15, 0.60, 1.0)
_VAGUE = 0.04  # share of objects described by shape or colour alone
_TRIES = 300


def split_of(sentence: str) -> str:
    """The split that a sentence belongs to: a fixed hash of its text, so no sentence is in two splits."""
    bucket = int.from_bytes(hashlib.sha256(sentence.encode()).digest()[:8], "big") % 100
    return next(name for name, end in zip(SPLITS, _BUCKET_ENDS, strict=True) if bucket < end)


def describe_for_split(
    rng: np.random.Generator, scene: Scene, split: str, count: int
) -> list[tuple[str, tuple[int, ...]]] | None:
    """Draws `count` different sentences of the split; None if the scene offers too few (draw another)."""
    found: dict[str, tuple[int, ...]] = {}
    for _ in range(_TRIES):
        sentence, named = describe(rng, scene)
        if split_of(sentence) == split:
            found.setdefault(sentence, named)
        if len(found) == count:
            return list(found.items())
    return None


def describe(rng: np.random.Generator, scene: Scene) -> tuple[str, tuple[int, ...]]:
    """Draws a sentence of at most 16 words; returns it with the indices of the objects named, sorted."""
    count = 1 + int(np.searchsorted(_COUNT_CUMULATIVE, rng.random()))
    count = min(count, len(scene.objects))
    while True:
        order = rng.permutation(len(scene.objects))[:count]
        objects = [scene.objects[i] for i in order]
        sentence = (_one, _two, _three)[count - 1](rng, objects, scene.image_size)
        if len(sentence.split()) <= MAX_WORDS:
            return sentence, tuple(sorted(int(i) for i in order))


def _one(rng, objects, image_size):
    """A lone object gets its size or its place, mostly both: colour and shape alone fit many pictures."""
    kind = rng.random()
    thing = _noun_phrase(rng, objects[0], size=0.8 if kind < 0.85 else 1.0)
    if kind >= 0.85:
        return _pick(rng, f"there is {thing}", f"the picture shows {thing}")
    place = _place(rng, objects[0], image_size)
    return _pick(
        rng,
        f"there is {thing} {place}",
        f"{thing} is {place}",
        f"{place} there is {thing}",
        f"the picture shows {thing} {place}",
    )


def _two(rng, objects, image_size):
    a, b = (_noun_phrase(rng, o, size=0.5) for o in objects)
    related = relation(*objects)
    kind = rng.random()
    if related and kind < 0.65:
        how = _RELATIONS[related]
        return _pick(rng, f"{a} is {how} {b}", f"there is {a} {how} {b}", f"the picture shows {a} {how} {b}")
    place = _place(rng, objects[0], image_size)
    if kind < 0.88:
        other = _place(rng, objects[1], image_size)
        return _pick(
            rng,
            f"{a} is {place} and {b} is {other}",
            f"there is {a} {place} and {b} {other}",
            f"{place} there is {a} and {other} there is {b}",
        )
    return _pick(rng, f"there is {a} and {b}", f"the picture shows {a} and {b}")


def _three(rng, objects, image_size):
    a, b, c = (_noun_phrase(rng, o, size=0.4) for o in objects)
    ab, ac, bc = relation(objects[0], objects[1]), relation(objects[0], objects[2]), relation(*objects[1:])
    options = []
    if ab and ac and ab != ac:
        options.append(f"{a} is {_RELATIONS[ab]} {b} and {_RELATIONS[ac]} {c}")
    if ac and ac == bc:
        options.append(f"{a} and {b} are {_RELATIONS[ac]} {c}")
    if ab and ab == ac:
        options.append(f"there is {a} {_RELATIONS[ab]} {b} and {c}")
    if ab:
        place = _place(rng, objects[2], image_size)
        options.append(f"{a} is {_RELATIONS[ab]} {b} and {c} is {place}")
        options.append(f"there is {a} {_RELATIONS[ab]} {b} and {c} {place}")
    if options and rng.random() < 0.75:
        return _pick(rng, *options)
    return _pick(
        rng,
        f"there is {a} and {b} and {c}",
        f"the picture shows {a} and {b} and {c}",
        f"there is {a} {_place(rng, objects[0], image_size)} with {b} and {c}",
    )


def _noun_phrase(rng, obj: SceneObject, size: float) -> str:
    """'a small red star'; `size` is the probability of naming the size."""
    words = [obj.size] if rng.random() < size else []
    vague = rng.random()
    if vague >= _VAGUE / 2:
        words.append(obj.colour)
    words.append("shape" if _VAGUE / 2 <= vague < _VAGUE else obj.shape)
    return ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)


def _place(rng, obj: SceneObject, image_size: int) -> str:
    vertical, horizontal = region(obj, image_size)
    if vertical == horizontal == "middle":
        return "in the middle"
    if "middle" in (vertical, horizontal):
        return _SIDES[horizontal if vertical == "middle" else vertical]
    if rng.random() < 0.7:
        return f"in the {vertical} {horizontal} corner"
    return _SIDES[_pick(rng, vertical, horizontal)]


def _pick(rng, *options):
    return options[int(rng.integers(len(options)))]
