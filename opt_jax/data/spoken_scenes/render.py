"""Paints a scene: antialiased shapes on a light, slightly tinted and noisy background."""

import numpy as np
from PIL import Image, ImageDraw

from opt_jax.data.spoken_scenes.scene import COLOURS, Scene, SceneObject

_SUPERSAMPLING = 3
_RING_HOLE = 0.56  # inner over outer radius


def render(rng: np.random.Generator, scene: Scene) -> np.ndarray:
    """Returns uint8 [image_size, image_size, 3]. `rng` draws tints, shade and noise, never geometry."""
    side = scene.image_size
    ramp = np.linspace(-0.5, 0.5, side, dtype=np.float32)
    tint = rng.uniform(222, 248, 3).astype(np.float32)
    slope = rng.uniform(-10, 10, 2)
    picture = tint + (slope[0] * ramp[:, None] + slope[1] * ramp[None, :])[:, :, None].astype(np.float32)
    for obj in scene.objects:
        colour = np.array(COLOURS[obj.colour], np.float32) + rng.uniform(-10, 10, 3).astype(np.float32)
        left, top, alpha = _coverage(obj, side)
        window = picture[top : top + alpha.shape[0], left : left + alpha.shape[1]]
        window += alpha[:, :, None] * (colour - window)
    # One draw for the three channels: grain as of a camera's luminance, and it compresses well.
    picture += rng.normal(0.0, rng.uniform(0.5, 2.0), (side, side)).astype(np.float32)[:, :, None]
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def _coverage(obj: SceneObject, side: int) -> tuple[int, int, np.ndarray]:
    """Left, top, and how much of each pixel the object covers, float32 [h, w] in [0, 1]."""
    x1, y1, x2, y2 = obj.box()
    left, top = max(int(x1) - 1, 0), max(int(y1) - 1, 0)
    right, bottom = min(int(x2) + 2, side), min(int(y2) + 2, side)
    k = _SUPERSAMPLING
    mask = Image.new("L", ((right - left) * k, (bottom - top) * k))
    draw = ImageDraw.Draw(mask)
    outline = obj.outline()
    # PIL paints the pixels whose centres it is given; half a sub-pixel aligns them with edge coordinates.
    if outline is not None:
        points = (outline - (left, top)) * k - 0.5
        draw.polygon([(float(x), float(y)) for x, y in points], fill=255)
    else:
        cx, cy = (obj.x - left) * k - 0.5, (obj.y - top) * k - 0.5
        discs = [(1.0, 255), (_RING_HOLE, 0)] if obj.shape == "ring" else [(1.0, 255)]
        for scale, fill in discs:
            r = obj.radius * scale * k
            draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=fill)
    return left, top, np.asarray(mask.reduce(k), np.float32) / 255.0
