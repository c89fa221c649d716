"""Scenes: up to three things on a background, their words, drawing and sampling."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np
from PIL import Image

from localdit.scenes.shapes import SHAPES, draw_shape, outline_bottom

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (220, 55, 60),
    "orange": (246, 140, 40),
    "yellow": (252, 212, 70),
    "green": (60, 165, 90),
    "turquoise": (70, 200, 195),
    "blue": (50, 105, 215),
    "purple": (130, 75, 180),
    "pink": (246, 150, 190),
    "brown": (135, 90, 55),
    "grey": (150, 155, 165),
    "white": (248, 246, 240),
    "black": (35, 35, 45),
}
COLOURS: tuple[str, ...] = tuple(PALETTE)

# Radius of the circle, as a fraction of the picture's side. The other shapes get about its area.
SIZE_RADIUS: dict[str, float] = {"small": 20 / 256, "large": 36 / 256}
SIZES: tuple[str, ...] = tuple(SIZE_RADIUS)

# Kinds of backgrounds, each with the colours that it may have, from the top or from the left.
_BLENDS = (
    ("black", "blue"), ("black", "purple"), ("blue", "turquoise"), ("blue", "white"),
    ("green", "yellow"), ("orange", "yellow"), ("pink", "white"), ("purple", "pink"),
    ("red", "orange"), ("turquoise", "white"),
)  # fmt: skip
_STRIPES = tuple((colour, "white") for colour in COLOURS if colour not in ("white", "brown"))
_SKIES = ("blue", "turquoise", "pink", "orange", "white", "black")
_GROUNDS = ("green", "brown", "yellow", "white", "grey")
BACKGROUNDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "plain": tuple((colour,) for colour in COLOURS),
    "gradient": tuple(pair for first, second in _BLENDS
                      for pair in ((first, second), (second, first))),
    "stripes": _STRIPES,
    "ground": tuple((sky, ground) for sky in _SKIES for ground in _GROUNDS if sky != ground),
}  # fmt: skip
BANDS = 8  # number of stripes
HORIZON = 0.75  # of the side, from the top
_KIND_SHARE = {"plain": 0.3, "gradient": 0.25, "stripes": 0.15, "ground": 0.3}
_LEAST_DISTANCE = 100.0  # of an object's colour from each of the background's, in RGB

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

# Centres of three objects, in the order in which a scene lists them.
ARRANGEMENT_CENTRES: dict[str, tuple[tuple[float, float], ...]] = {
    "row": ((0.19, 0.5), (0.5, 0.5), (0.81, 0.5)),  # from left to right
    "column": ((0.5, 0.19), (0.5, 0.5), (0.5, 0.81)),  # from top to bottom
    "one above two": ((0.5, 0.23), (0.25, 0.75), (0.75, 0.75)),  # above, left, right
    "two above one": ((0.25, 0.25), (0.75, 0.25), (0.5, 0.75)),  # left, right, below
}
ARRANGEMENTS: tuple[str, ...] = tuple(ARRANGEMENT_CENTRES)

GRID = 16  # things are centred on lines of a grid of so many cells along the side
HELD_OUT_PERCENT = 10
_STAND = 0.85  # of the side: where things stand that are side by side on the ground
_TWINS = 0.15  # share of the scenes with several objects in which two look the same
_ROWS_ON_GROUND = 0.5  # share of the scenes with three objects on ground that are set to a row


@dataclass(frozen=True)
class Background:
    """The background of a scene.

    Args:
        kind: One of `BACKGROUNDS`: one plain colour; a gradient from top to bottom; vertical
            stripes of two colours; or a sky above the ground.
        colours: The colour, or two: of the top and the bottom, of the stripes from the left, or of
            sky and ground.

    Raises:
        ValueError: if the kind is unknown, or has no such colours.
    """

    kind: str
    colours: tuple[str, ...]

    def __post_init__(self) -> None:
        _check("kind of background", self.kind, tuple(BACKGROUNDS))
        if self.colours not in BACKGROUNDS[self.kind]:
            choices = ", ".join(" and ".join(colours) for colours in BACKGROUNDS[self.kind])
            raise ValueError(
                f"the colours of a {self.kind} background must be one of {choices}; "
                f"got {' and '.join(self.colours)!r}"
            )

    @staticmethod
    def plain(colour: str) -> Background:
        """Return a background of one colour."""
        return Background("plain", (colour,))

    def pixels(self, side: int) -> np.ndarray:
        """Return the RGB values (side, side, 3) in 0..255, as float64."""
        first, last = (np.array(PALETTE[self.colours[i]], dtype=np.float64) for i in (0, -1))
        centres = (np.arange(side) + 0.5) / side
        if self.kind == "gradient":
            share = centres[:, None]
        elif self.kind == "stripes":
            share = (np.floor(centres * BANDS) % 2)[None, :]
        else:
            share = (centres > HORIZON)[:, None].astype(np.float64)
        share = np.broadcast_to(share, (side, side))[:, :, None]
        return (1.0 - share) * first + share * last

    def shows(self, colour: str) -> bool:
        """Return whether an object of that colour stands out everywhere on the background."""
        if colour in self.colours:
            return False
        first, last = (np.array(PALETTE[self.colours[i]], dtype=np.float64) for i in (0, -1))
        steps = np.linspace(0.0, 1.0, 11 if self.kind == "gradient" else 2)[:, None]
        between = (1.0 - steps) * first + steps * last
        away = np.linalg.norm(between - np.array(PALETTE[colour]), axis=1)
        return bool(away.min() >= _LEAST_DISTANCE)

    def __str__(self) -> str:
        return " ".join([self.kind, *self.colours])


@dataclass(frozen=True)
class SceneObject:
    """One thing.

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
    def look(self) -> tuple[str, str, str]:
        """Shape, colour and size."""
        return self.shape, self.colour, self.size

    @property
    def position(self) -> str:
        """Nearest of `POSITIONS`."""
        return nearest_position(self.x, self.y)


@dataclass(frozen=True)
class Scene:
    """A background and one to three objects on it.

    Args:
        background: The background; no object may have one of its colours.
        objects: One to three objects; three in the order of `ARRANGEMENT_CENTRES`.

    Raises:
        ValueError: if an object has a colour of the background, there are not one to three objects,
            or three are not in one of `ARRANGEMENTS`.
    """

    background: Background
    objects: tuple[SceneObject, ...]

    def __post_init__(self) -> None:
        if len(self.objects) not in (1, 2, 3):
            raise ValueError(f"a scene has 1 to 3 objects, not {len(self.objects)}")
        for thing in self.objects:
            if thing.colour in self.background.colours:
                raise ValueError(f"an object cannot be seen on its own colour, {thing.colour}")
        if len(self.objects) == 3 and self.arrangement is None:
            raise ValueError(
                f"three objects must form one of {', '.join(ARRANGEMENTS)}, in the order that "
                "ARRANGEMENT_CENTRES lists"
            )

    @property
    def relations(self) -> tuple[str, ...]:
        """Relation of each object to each later one: 0 to 1; and of three, 0 to 2 and 1 to 2."""
        return relations_between([(thing.x, thing.y) for thing in self.objects])

    @property
    def arrangement(self) -> str | None:
        """The one of `ARRANGEMENTS` that three objects form; None for fewer."""
        return next((name for name, centres in ARRANGEMENT_CENTRES.items()
                     if relations_between(centres) == self.relations), None)  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Return the scene as JSON values, with positions, relations and arrangement in words."""
        objects = [asdict(thing) | {"position": thing.position} for thing in self.objects]
        return {
            "background": asdict(self.background) | {"colours": list(self.background.colours)},
            "objects": objects,
            "relations": list(self.relations),
            "arrangement": self.arrangement,
        }

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Scene:
        """Invert `to_dict`. A background may be the name of a plain colour."""
        names = ("shape", "colour", "size", "x", "y")
        objects = (SceneObject(**{name: o[name] for name in names}) for o in values["objects"])
        behind = values["background"]
        background = (
            Background.plain(behind) if isinstance(behind, str)
            else Background(behind["kind"], tuple(behind["colours"]))
        )  # fmt: skip
        return Scene(background, tuple(objects))


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


def relations_between(centres: tuple[tuple[float, float], ...] | list[tuple[float, float]]
                      ) -> tuple[str, ...]:  # fmt: skip
    """Return the relation of each centre (x, y) to each later one."""
    return tuple(relation_between(first, second) for first, second in combinations(centres, 2))


def draw_scene(scene: Scene, side: int = 256) -> Image.Image:
    """Draw a scene as an RGB picture of `side` x `side` pixels with smooth edges.

    Raises:
        ValueError: if `side` is less than 1.
    """
    if side < 1:
        raise ValueError(f"side must be at least 1, got {side}")
    pixels = scene.background.pixels(side)
    picture = Image.fromarray((pixels + 0.5).astype(np.uint8))
    for thing in scene.objects:
        radius = SIZE_RADIUS[thing.size] * side
        centre = (thing.x * side, thing.y * side)
        draw_shape(picture, thing.shape, PALETTE[thing.colour], radius, centre)
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
    keys += [" and ".join(pair) for pair in combinations(things, 2)]
    digests = (hashlib.sha256(key.encode()).digest() for key in keys)
    return any(int.from_bytes(one[:4], "big") % 100 < HELD_OUT_PERCENT for one in digests)


def sample_scene(rng: np.random.Generator, held_out: bool = False) -> Scene:
    """Draw a scene with one to three objects at random from training's or the held-out part."""
    count = 1 + int(rng.integers(3))
    while True:  # rejection keeps every word as frequent as the split allows
        scene = (_one_object, _two_objects, _three_objects)[count - 1](rng)
        if scene is not None and is_held_out(scene) == held_out:
            return scene


def sample_scenes(count: int, seed: int, held_out: bool = False) -> Iterator[Scene]:
    """Yield `count` scenes; each depends only on `seed` and its index, not on `count`."""
    for index in range(count):
        yield sample_scene(np.random.default_rng([seed, int(held_out), index]), held_out)


def _choose(rng: np.random.Generator, words: tuple[Any, ...]) -> Any:
    return words[int(rng.integers(len(words)))]


def _background(rng: np.random.Generator) -> Background:
    kind = str(rng.choice(list(_KIND_SHARE), p=list(_KIND_SHARE.values())))
    return Background(kind, _choose(rng, BACKGROUNDS[kind]))


def _looks(rng: np.random.Generator, count: int, background: Background
           ) -> list[tuple[str, str, str]] | None:  # fmt: skip
    """Return shape, colour and size of each object, or None if words could not tell them apart."""
    looks = [(_choose(rng, SHAPES), _choose(rng, COLOURS), _choose(rng, SIZES))
             for _ in range(count)]  # fmt: skip
    if count > 1 and rng.random() < _TWINS:
        first, second = rng.choice(count, 2, replace=False).tolist()
        looks[second] = looks[first]
    # Objects that differ only in size are hard to tell from a mistake.
    alike = any(a[:2] == b[:2] and a != b for a, b in combinations(looks, 2))
    seen = all(background.shows(colour) for _, colour, _ in looks)
    return looks if seen and not alike else None


def _place(looks: list[tuple[str, str, str]], centres: np.ndarray, background: Background,
           standing: tuple[int, ...]) -> Scene:  # fmt: skip
    """Return the scene on the grid; on the ground, the objects of `standing` stand on one line."""
    if background.kind == "ground":
        for index in standing:
            shape, _, size = looks[index]
            centres[index, 1] = _STAND - outline_bottom(shape) * SIZE_RADIUS[size]
    centres = np.round(centres * GRID) / GRID
    objects = (SceneObject(*look, float(x), float(y))
               for look, (x, y) in zip(looks, centres, strict=True))  # fmt: skip
    return Scene(background, tuple(objects))


def _one_object(rng: np.random.Generator) -> Scene | None:
    background = _background(rng)
    looks = _looks(rng, 1, background)
    centre = np.array([POSITION_CENTRE[_choose(rng, POSITIONS)]])
    return None if looks is None else _place(looks, centre, background, ())


def _two_objects(rng: np.random.Generator) -> Scene | None:
    background = _background(rng)
    looks = _looks(rng, 2, background)
    direction = np.array(RELATION_DIRECTION[_choose(rng, RELATIONS)])
    centres = 0.5 + 0.25 * np.stack([direction, -direction])
    if looks is None:
        return None
    return _place(looks, centres, background, (0, 1) if direction[0] else ())


def _three_objects(rng: np.random.Generator) -> Scene | None:
    background = _background(rng)
    looks = _looks(rng, 3, background)
    arrangement = _choose(rng, ARRANGEMENTS)
    if background.kind == "ground" and rng.random() < _ROWS_ON_GROUND:
        arrangement = "row"  # what people ask for: a house between two trees
    centres = np.array(ARRANGEMENT_CENTRES[arrangement])
    if looks is None:
        return None
    large = [size == "large" for _, _, size in looks]
    if arrangement in ("row", "column") and large[1] and (large[0] or large[2]):
        return None  # too large to stay apart
    standing = {"row": (0, 1, 2), "one above two": (1, 2)}.get(arrangement, ())
    return _place(looks, centres, background, standing)
