"""Scenes: one or two plain shapes on a plain background, their words, drawing and sampling."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 40),
    "green": (40, 160, 65),
    "blue": (40, 80, 220),
    "yellow": (250, 225, 50),
    "orange": (245, 135, 25),
    "purple": (140, 50, 180),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
COLOURS: tuple[str, ...] = tuple(PALETTE)
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "diamond", "cross")

# Radius of the circle, as a fraction of the picture's side. The other shapes get about its area.
SIZE_RADIUS: dict[str, float] = {"small": 0.09, "large": 0.175}
SIZES: tuple[str, ...] = tuple(SIZE_RADIUS)

# Centre (x, y) of each cell, as fractions of the side, x to the right and y downwards.
POSITION_CENTRE: dict[str, tuple[float, float]] = {
    "top left": (0.25, 0.25),
    "top": (0.5, 0.25),
    "top right": (0.75, 0.25),
    "left": (0.25, 0.5),
    "centre": (0.5, 0.5),
    "right": (0.75, 0.5),
    "bottom left": (0.25, 0.75),
    "bottom": (0.5, 0.75),
    "bottom right": (0.75, 0.75),
}
POSITIONS: tuple[str, ...] = tuple(POSITION_CENTRE)

# Direction (x, y) from the second object to the first.
RELATION_DIRECTION: dict[str, tuple[int, int]] = {
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
RELATIONS: tuple[str, ...] = tuple(RELATION_DIRECTION)

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

HELD_OUT_PERCENT = 10
_JITTER = 0.02  # of the side; keeps large shapes inside the picture and apart
_SLIDE = 0.08  # largest shift of two objects across the axis of their relation


@dataclass(frozen=True)
class SceneObject:
    """One shape.

    Args:
        shape: One of `SHAPES`.
        colour: One of `COLOURS`.
        size: One of `SIZES`.
        x: Centre of the shape's bounding box, as a fraction of the picture's width.
        y: The same as a fraction of the height, downwards.

    Raises:
        ValueError: if a word is not in its list, or the centre is outside of the picture.
    """

    shape: str
    colour: str
    size: str
    x: float
    y: float

    def __post_init__(self) -> None:
        _check("shape", self.shape, SHAPES)
        _check("colour", self.colour, COLOURS)
        _check("size", self.size, SIZES)
        if not (0.0 <= self.x <= 1.0 and 0.0 <= self.y <= 1.0):
            raise ValueError(f"the centre ({self.x}, {self.y}) must lie within [0, 1] x [0, 1]")

    @property
    def position(self) -> str:
        """Nearest of `POSITIONS`."""
        return nearest_position(self.x, self.y)


@dataclass(frozen=True)
class Scene:
    """A background colour and one or two objects on it.

    Args:
        background: One of `COLOURS`; no object may have it.
        objects: One or two objects.

    Raises:
        ValueError: if the background is unknown or is the colour of an object, or there are not
            one or two objects.
    """

    background: str
    objects: tuple[SceneObject, ...]

    def __post_init__(self) -> None:
        _check("background", self.background, COLOURS)
        if len(self.objects) not in (1, 2):
            raise ValueError(f"a scene has 1 or 2 objects, not {len(self.objects)}")
        if any(thing.colour == self.background for thing in self.objects):
            raise ValueError(f"an object cannot be seen on its own colour, {self.background}")

    @property
    def relation(self) -> str | None:
        """Relation of the first object to the second; None for a single object."""
        if len(self.objects) == 1:
            return None
        first, second = self.objects
        return relation_between((first.x, first.y), (second.x, second.y))

    def to_dict(self) -> dict[str, Any]:
        """Return the scene as JSON values, with position and relation in words."""
        objects = [asdict(thing) | {"position": thing.position} for thing in self.objects]
        return {"background": self.background, "objects": objects, "relation": self.relation}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Scene:
        """Invert `to_dict`."""
        names = ("shape", "colour", "size", "x", "y")
        objects = (SceneObject(**{name: o[name] for name in names}) for o in values["objects"])
        return Scene(values["background"], tuple(objects))


def nearest_position(x: float, y: float) -> str:
    """Return the cell of the 3 x 3 grid whose centre is nearest to (x, y), both in [0, 1]."""
    return min(
        POSITIONS,
        key=lambda p: (POSITION_CENTRE[p][0] - x) ** 2 + (POSITION_CENTRE[p][1] - y) ** 2,
    )


def relation_between(first: tuple[float, float], second: tuple[float, float]) -> str:
    """Return the relation of `first` to `second`, both (x, y), on the axis of larger distance."""
    dx, dy = first[0] - second[0], first[1] - second[1]
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def outline(shape: str) -> np.ndarray:
    """Return the corners of a shape, (n, 2) as (x, y), in units of its radius, y downwards."""
    if shape != "circle":
        return np.asarray(_CORNERS[shape])
    angles = np.arange(_CIRCLE_CORNERS) * (2.0 * math.pi / _CIRCLE_CORNERS)
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1)


def coverage(thing: SceneObject, side: int) -> Image.Image:
    """Draw the share of each pixel that the object covers, as an "L" picture, `side` x `side`."""
    fine = side * SUPERSAMPLING
    corners = outline(thing.shape) * SIZE_RADIUS[thing.size] + np.array([thing.x, thing.y])
    mask = Image.new("L", (fine, fine), 0)
    # Pillow puts pixel centres at whole numbers; here they are half a pixel further.
    ImageDraw.Draw(mask).polygon([(x, y) for x, y in (corners * fine - 0.5).tolist()], fill=255)
    return mask.reduce(SUPERSAMPLING)


def draw_scene(scene: Scene, side: int = 128) -> Image.Image:
    """Draw a scene as an RGB picture of `side` x `side` pixels with smooth edges.

    Raises:
        ValueError: if `side` is less than 1.
    """
    if side < 1:
        raise ValueError(f"side must be at least 1, got {side}")
    picture = Image.new("RGB", (side, side), PALETTE[scene.background])
    for thing in scene.objects:
        picture.paste(PALETTE[thing.colour], (0, 0, side, side), coverage(thing, side))
    return picture


def _check(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


# Random scenes, and the split into training and held-out scenes


def is_held_out(scene: Scene) -> bool:
    """Return whether a scene is held out for evaluation.

    A tenth of the triples (shape, colour, background) and a tenth of the unordered pairs
    {(shape, colour), (shape, colour)} are held out, by a hash of the words. A scene with any
    held-out triple or pair is never used for training.
    """
    things = sorted(f"{thing.colour} {thing.shape}" for thing in scene.objects)
    keys = [f"{thing} on {scene.background}" for thing in things]
    if len(things) == 2:
        keys.append(" and ".join(things))
    digests = (hashlib.sha256(key.encode()).digest() for key in keys)
    return any(int.from_bytes(one[:4], "big") % 100 < HELD_OUT_PERCENT for one in digests)


def sample_scene(rng: np.random.Generator, held_out: bool = False) -> Scene:
    """Draw a scene with one or two objects at random from the training or the held-out part."""
    two = bool(rng.integers(2))
    while True:  # rejection keeps every word as frequent as the split allows
        scene = _two_objects(rng) if two else _one_object(rng)
        if scene is not None and is_held_out(scene) == held_out:
            return scene


def sample_scenes(count: int, seed: int, held_out: bool = False) -> Iterator[Scene]:
    """Yield `count` scenes; each depends only on `seed` and its index, not on `count`."""
    for index in range(count):
        yield sample_scene(np.random.default_rng([seed, int(held_out), index]), held_out)


def _choose(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    return words[int(rng.integers(len(words)))]


def _look(rng: np.random.Generator) -> tuple[str, str, str]:
    return _choose(rng, SHAPES), _choose(rng, COLOURS), _choose(rng, SIZES)


def _one_object(rng: np.random.Generator) -> Scene | None:
    background, (shape, colour, size) = _choose(rng, COLOURS), _look(rng)
    x, y = POSITION_CENTRE[_choose(rng, POSITIONS)]
    dx, dy = rng.uniform(-_JITTER, _JITTER, 2).tolist()
    if colour == background:
        return None
    return Scene(background, (SceneObject(shape, colour, size, x + dx, y + dy),))


def _two_objects(rng: np.random.Generator) -> Scene | None:
    background, first, second = _choose(rng, COLOURS), _look(rng), _look(rng)
    direction = RELATION_DIRECTION[_choose(rng, RELATIONS)]
    along = rng.uniform(0.25 - _JITTER, 0.25 + _JITTER, 2) * (1, -1)
    across = rng.uniform(-_SLIDE, _SLIDE, 2)
    # Words could not distinguish two objects of the same look, so they are rejected as well.
    if background in (first[1], second[1]) or first[:2] == second[:2]:
        return None
    objects = []
    for look, step, slide in zip((first, second), along, across, strict=True):
        x = 0.5 + direction[0] * step + abs(direction[1]) * slide
        y = 0.5 + direction[1] * step + abs(direction[0]) * slide
        objects.append(SceneObject(*look, float(x), float(y)))
    return Scene(background, tuple(objects))
