"""Random scenes: which shapes, colours and sizes stand where."""

import math
from dataclasses import dataclass

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = {
    "red": (214, 30, 36),
    "orange": (245, 130, 10),
    "yellow": (246, 214, 20),
    "green": (36, 150, 52),
    "blue": (30, 80, 210),
    "purple": (124, 44, 164),
    "pink": (246, 140, 190),
    "black": (24, 24, 28),
}
COLOUR_NAMES = tuple(COLOURS)
SIZES = ("small", "large")
CLASS_NAMES = tuple(f"{colour} {shape}" for shape in SHAPES for colour in COLOUR_NAMES)

# Half extents as fractions of the picture's side; the gap between the two ranges makes sizes unmistakable.
RADII = {"small": (0.076, 0.094), "large": (0.140, 0.170)}
# Left and right (top and bottom) thirds begin here, as a fraction of the picture's side.
THIRD = 0.36
# Two objects stand in a relation only if the offset along its axis exceeds the other offset by this factor.
DOMINANCE = 1.3
_COUNT_PROBABILITIES = (0.05, 0.20, 0.30, 0.25, 0.20)
MAX_OBJECTS = len(_COUNT_PROBABILITIES)
_MAX_ANGLE = {"square": 14, "triangle": 14, "star": 36, "cross": 14}
_PLACEMENT_TRIES = 60


@dataclass(frozen=True)
class SceneObject:
    """A shape in a picture; `x`, `y` (centre) and `radius` in pixels, `angle` in degrees."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    angle: float

    @property
    def detector_class(self) -> int:
        """1 + shape * 8 + colour; 0 is the detector's background."""
        return 1 + SHAPES.index(self.shape) * len(COLOUR_NAMES) + COLOUR_NAMES.index(self.colour)

    def outline(self) -> np.ndarray | None:
        """Vertices, float [n, 2] in pixels; None for the circle and the ring."""
        r = self.radius
        if self.shape == "square":
            a = 0.86 * r
            points = [(-a, -a), (a, -a), (a, a), (-a, a)]
        elif self.shape == "triangle":
            points = _centred([_polar(1.12 * r, -90 + 120 * k) for k in range(3)])
        elif self.shape == "star":
            points = _centred([_polar(r * (1.14 if k % 2 == 0 else 0.48), -90 + 36 * k) for k in range(10)])
        elif self.shape == "cross":
            a, b = 0.33 * r, 1.02 * r
            points = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a)]
            points += [(a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]
        else:
            return None
        c, s = math.cos(math.radians(self.angle)), math.sin(math.radians(self.angle))
        return np.array([(self.x + c * px - s * py, self.y + s * px + c * py) for px, py in points])

    def box(self) -> tuple[float, float, float, float]:
        """The tight box x1, y1, x2, y2 in pixels."""
        outline = self.outline()
        if outline is None:
            r = self.radius
            return self.x - r, self.y - r, self.x + r, self.y + r
        (x1, y1), (x2, y2) = outline.min(axis=0), outline.max(axis=0)
        return float(x1), float(y1), float(x2), float(y2)


@dataclass(frozen=True)
class Scene:
    """Objects of pairwise different classes, whose boxes do not touch, in a square picture."""

    image_size: int
    objects: tuple[SceneObject, ...]

    def boxes(self) -> np.ndarray:
        """float32 [n, 4], x1 y1 x2 y2 in pixels."""
        return np.array([o.box() for o in self.objects], np.float32).reshape(-1, 4)

    def classes(self) -> np.ndarray:
        """int32 [n], 1-based detector classes."""
        return np.array([o.detector_class for o in self.objects], np.int32)

    def labels(self) -> tuple[int, ...]:
        """Sorted 0-based classes."""
        return tuple(sorted(o.detector_class - 1 for o in self.objects))


def draw_scene(rng: np.random.Generator, image_size: int, max_objects: int = MAX_OBJECTS) -> Scene:
    """Draws one to `max_objects` objects (at most `MAX_OBJECTS`), mostly two or more."""
    weights = np.array(_COUNT_PROBABILITIES[:max_objects])
    count = 1 + int(np.searchsorted(np.cumsum(weights / weights.sum()), rng.random()))
    while True:
        classes = rng.permutation(len(CLASS_NAMES))[:count]
        objects: list[SceneObject] = []
        for index in classes:
            placed = _place(rng, int(index), objects, image_size)
            if placed is None:  # too crowded: begin again rather than drop an object, which would bias counts
                break
            objects.append(placed)
        if len(objects) == count:
            return Scene(image_size, tuple(objects))


def relation(a: SceneObject, b: SceneObject) -> str | None:
    """'left', 'right', 'above' or 'below' as seen from `a` towards `b`; None where the offset is diagonal."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) >= DOMINANCE * abs(dy):
        return "left" if dx < 0 else "right"
    if abs(dy) >= DOMINANCE * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def region(obj: SceneObject, image_size: int) -> tuple[str, str]:
    """(vertical, horizontal) of ('top', 'middle', 'bottom') x ('left', 'middle', 'right')."""
    def third(value, names):
        fraction = value / image_size
        return names[0] if fraction < THIRD else names[2] if fraction > 1 - THIRD else names[1]

    return third(obj.y, ("top", "middle", "bottom")), third(obj.x, ("left", "middle", "right"))


def _place(rng, index, others, image_size):
    shape, colour = SHAPES[index // len(COLOUR_NAMES)], COLOUR_NAMES[index % len(COLOUR_NAMES)]
    size = SIZES[int(rng.integers(2))]
    radius = rng.uniform(*RADII[size]) * image_size
    limit = _MAX_ANGLE.get(shape, 0)
    angle = rng.uniform(-limit, limit)
    gap = 0.02 * image_size
    low, high = 1.16 * radius + 1, image_size - 1.16 * radius - 1
    taken = [o.box() for o in others]
    for _ in range(_PLACEMENT_TRIES):
        obj = SceneObject(shape, colour, size, rng.uniform(low, high), rng.uniform(low, high), radius, angle)
        x1, y1, x2, y2 = obj.box()
        if all(x2 + gap < b[0] or b[2] + gap < x1 or y2 + gap < b[1] or b[3] + gap < y1 for b in taken):
            return obj
    return None


def _centred(points):
    """Moves upright points so that the middle of their vertical extent is 0: positions speak of the box."""
    heights = [y for _, y in points]
    middle = (min(heights) + max(heights)) / 2
    return [(x, y - middle) for x, y in points]


def _polar(radius, degrees):
    return radius * math.cos(math.radians(degrees)), radius * math.sin(math.radians(degrees))
