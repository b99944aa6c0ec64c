"""Questions about a scene, each with one right answer. Their pictures are drawn anew, as those of sentences.

Answers of a kind are about equally frequent: of yes and no each is asked for half of the time, numbers and
names as often as scenes have them.
"""

import numpy as np

from opt_jax.data.spoken_scenes.scene import COLOUR_NAMES, SHAPES, SIZES, Scene, SceneObject, relation

QUESTIONS_VERSION = 1  # of what this file asks
NUMBERS = ("zero", "one", "two", "three", "four", "five")
ANSWERS = ("yes", "no", *NUMBERS, *COLOUR_NAMES, *SHAPES, *SIZES)
_RELATIONS = {"left": "left of", "right": "right of", "above": "above", "below": "below"}


def ask(rng: np.random.Generator, scene: Scene) -> tuple[str, str]:
    """Draws a question about the scene, and its answer, one of ANSWERS."""
    kinds = (_colour, _shape, _size, _count, _presence, _relation)
    while True:
        asked = kinds[int(rng.integers(len(kinds)))](rng, scene)
        if asked is not None:
            return asked


def _colour(rng, scene):
    obj = _only(rng, scene, lambda o: o.shape)
    return obj and (f"what colour is the {obj.shape}", obj.colour)


def _shape(rng, scene):
    obj = _only(rng, scene, lambda o: o.colour)
    return obj and (f"what shape is the {obj.colour} one", obj.shape)


def _size(rng, scene):
    obj = _only(rng, scene, lambda o: o.shape)
    return obj and (f"what size is the {obj.shape}", obj.size)


def _count(rng, scene):
    if rng.random() < 0.5:
        return "how many shapes are there", NUMBERS[len(scene.objects)]
    # Of the shapes one that is there as often as one that may be missing: else zero would be most answers.
    shapes = [o.shape for o in scene.objects] if rng.random() < 0.7 else SHAPES
    shape = shapes[int(rng.integers(len(shapes)))]
    plural = "crosses" if shape == "cross" else f"{shape}s"
    return f"how many {plural} are there", NUMBERS[sum(o.shape == shape for o in scene.objects)]


def _presence(rng, scene):
    if rng.random() < 0.5:
        obj = scene.objects[int(rng.integers(len(scene.objects)))]
        return f"is there {_article(obj.colour)} {obj.colour} {obj.shape}", "yes"
    there = {(o.colour, o.shape) for o in scene.objects}
    # Half of what is missing shares a colour or a shape with what is there, so that both have to be seen.
    obj = scene.objects[int(rng.integers(len(scene.objects)))]
    colour, shape = _one(rng, COLOUR_NAMES), _one(rng, SHAPES)
    colour, shape = ((obj.colour, shape), (colour, obj.shape), (colour, shape))[int(rng.integers(3))]
    if (colour, shape) in there:
        return None
    return f"is there {_article(colour)} {colour} {shape}", "no"


def _relation(rng, scene):
    """Between two shapes that are there once each, in a relation that is plain; the answer is drawn first."""
    counts = {shape: sum(o.shape == shape for o in scene.objects) for shape in SHAPES}
    single = [o for o in scene.objects if counts[o.shape] == 1]
    if len(single) < 2:
        return None
    a, b = (single[i] for i in rng.permutation(len(single))[:2])
    true = relation(a, b)
    if true is None:
        return None
    yes = rng.random() < 0.5
    # What is plainly false: of a circle that is left of a square, and a little higher, not "above".
    signs = {"left": a.x < b.x, "right": a.x > b.x, "above": a.y < b.y, "below": a.y > b.y}
    others = [name for name in _RELATIONS if not signs[name]]
    said = true if yes else _one(rng, others)
    return f"is the {a.shape} {_RELATIONS[said]} the {b.shape}", "yes" if yes else "no"


def _only(rng, scene: Scene, feature) -> SceneObject | None:
    """An object that no other shares the feature with."""
    values = [feature(o) for o in scene.objects]
    single = [o for o, value in zip(scene.objects, values, strict=True) if values.count(value) == 1]
    return single[int(rng.integers(len(single)))] if single else None


def _one(rng, options):
    return options[int(rng.integers(len(options)))]


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"
