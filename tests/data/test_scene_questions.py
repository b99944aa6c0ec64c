"""Questions about scenes, each answered again here from the objects by other code."""

import re
from collections import Counter

import numpy as np

from opt_jax.data.spoken_scenes.questions import ANSWERS, ask
from opt_jax.data.spoken_scenes.scene import COLOURS, SHAPES, Scene, SceneObject, draw_scene

NUMBERS = ["zero", "one", "two", "three", "four", "five"]


def answered(question: str, scene: Scene) -> str:
    """The answer by matching the words; AssertionError where the question has no single answer."""
    objects = scene.objects
    if match := re.fullmatch(r"what (colour|size) is the (\w+)", question):
        (found,) = [o for o in objects if o.shape == match[2]]
        return getattr(found, match[1])
    if match := re.fullmatch(r"what shape is the (\w+) one", question):
        (found,) = [o for o in objects if o.colour == match[1]]
        return found.shape
    if question == "how many shapes are there":
        return NUMBERS[len(objects)]
    if match := re.fullmatch(r"how many (\w+?)(?:es|s) are there", question):
        names = {"circl": "circle", "squar": "square", "triangl": "triangle"}
        return NUMBERS[sum(o.shape == names.get(match[1], match[1]) for o in objects)]
    if match := re.fullmatch(r"is there an? (\w+) (\w+)", question):
        assert match[1] in COLOURS and match[2] in SHAPES
        return "yes" if any((o.colour, o.shape) == match.groups() for o in objects) else "no"
    match = re.fullmatch(r"is the (\w+) (left of|right of|above|below) the (\w+)", question)
    (a,), (b,) = ([o for o in objects if o.shape == match[i]] for i in (1, 3))
    dx, dy = a.x - b.x, a.y - b.y
    true = {"left of": dx < 0, "right of": dx > 0, "above": dy < 0, "below": dy > 0}
    return "yes" if true[match[2]] else "no"


def test_every_answer_is_right():
    rng = np.random.default_rng(0)
    kinds, answers = Counter(), Counter()
    for _ in range(4000):
        scene = draw_scene(rng, 128)
        question, answer = ask(rng, scene)
        assert answered(question, scene) == answer, (question, answer, scene)
        kinds[" ".join(question.split()[:2])] += 1
        answers[answer] += 1
    assert set(answers) <= set(ANSWERS) and len(answers) >= len(ANSWERS) - 1
    assert min(kinds.values()) > 300 and len(kinds) == 6
    assert 0.8 < answers["yes"] / answers["no"] < 1.4
    assert max(answers.values()) < 0.3 * 4000  # no answer is worth giving blindly


def test_a_scene_of_one_object_can_be_asked_about():
    scene = Scene(128, (SceneObject("circle", "red", "small", 60.0, 60.0, 10.0, 0.0),))
    rng = np.random.default_rng(1)
    for question, answer in (ask(rng, scene) for _ in range(200)):
        assert answered(question, scene) == answer
