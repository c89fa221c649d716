"""Scene to picture."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

from localdit.scenes.scene import PALETTE, SIZE_RADIUS, Scene, SceneObject

SUPERSAMPLING = 4

# Corners in units of the circle's radius, around the centre of the bounding box; y downwards.
_SQUARE, _DIAMOND, _CROSS, _ARM = 0.88, 1.2, 1.15, 0.41
_CORNERS: dict[str, tuple[tuple[float, float], ...]] = {
    "square": ((-_SQUARE, -_SQUARE), (_SQUARE, -_SQUARE), (_SQUARE, _SQUARE), (-_SQUARE, _SQUARE)),
    "diamond": ((0.0, -_DIAMOND), (_DIAMOND, 0.0), (0.0, _DIAMOND), (-_DIAMOND, 0.0)),
    "triangle": ((0.0, -1.1), (1.2, 1.1), (-1.2, 1.1)),
    "cross": (
        (-_ARM, -_CROSS), (_ARM, -_CROSS), (_ARM, -_ARM), (_CROSS, -_ARM),
        (_CROSS, _ARM), (_ARM, _ARM), (_ARM, _CROSS), (-_ARM, _CROSS),
        (-_ARM, _ARM), (-_CROSS, _ARM), (-_CROSS, -_ARM), (-_ARM, -_ARM),
    ),
}  # fmt: skip
_CIRCLE_CORNERS = 96


def outline(shape: str) -> np.ndarray:
    """Corners of a shape, (n, 2) as (x, y), in units of the radius of its size, y downwards."""
    if shape != "circle":
        return np.asarray(_CORNERS[shape])
    angles = np.arange(_CIRCLE_CORNERS) * (2.0 * math.pi / _CIRCLE_CORNERS)
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1)


def coverage(thing: SceneObject, side: int) -> Image.Image:
    """How much of each pixel the object covers: an "L" picture of `side` x `side`."""
    fine = side * SUPERSAMPLING
    corners = outline(thing.shape) * SIZE_RADIUS[thing.size] + np.array([thing.x, thing.y])
    mask = Image.new("L", (fine, fine), 0)
    # Pillow puts pixel centres at whole numbers, we put them half a pixel further.
    ImageDraw.Draw(mask).polygon([(x, y) for x, y in (corners * fine - 0.5).tolist()], fill=255)
    return mask.reduce(SUPERSAMPLING)


def draw_scene(scene: Scene, side: int = 128) -> Image.Image:
    """Draws a scene as an RGB picture of `side` x `side` pixels with smooth edges.

    Raises:
        ValueError: `side` is less than 1.
    """
    if side < 1:
        raise ValueError(f"side must be at least 1, got {side}")
    picture = Image.new("RGB", (side, side), PALETTE[scene.background])
    for thing in scene.objects:
        picture.paste(PALETTE[thing.colour], (0, 0, side, side), coverage(thing, side))
    return picture
