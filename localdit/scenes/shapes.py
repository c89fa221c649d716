"""The shapes of scenes: polygons and discs, each in a shade of the object's colour."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

SUPERSAMPLING = 4

Polygon = np.ndarray  # corners (n, 2) as (x, y), in units of the object's radius, y downwards
Part = tuple[Polygon, str]  # a polygon and its shade: own, light, dark or hole

# Share of white or black in each shade.
_LIGHT, _DARK = 0.65, 0.35


def _polygon(*corners: tuple[float, float]) -> Polygon:
    return np.array(corners)


def _box(left: float, top: float, right: float, bottom: float) -> Polygon:
    return _polygon((left, top), (right, top), (right, bottom), (left, bottom))


def _arc(radius: float, x: float, y: float, start: float, stop: float) -> Polygon:
    """Return the points of an arc; angles in degrees, clockwise from the right."""
    angles = np.radians(np.linspace(start, stop, 96))
    return np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], axis=1)


def _disc(radius: float, x: float = 0.0, y: float = 0.0) -> Polygon:
    return _arc(radius, x, y, 0.0, 356.25)


def _star(points: int, outer: float, inner: float) -> Polygon:
    angles = np.arange(2 * points) * math.pi / points - math.pi / 2
    radii = np.where(np.arange(2 * points) % 2 == 0, outer, inner)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _mirrored(*corners: tuple[float, float]) -> Polygon:
    """Return a polygon from its corners on the right, from top to bottom."""
    return _polygon(*corners, *((-x, y) for x, y in reversed(corners)))


def _heart() -> Polygon:
    t = np.linspace(0.0, 2.0 * math.pi, 96, endpoint=False)
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([16 * np.sin(t) ** 3, y], axis=1) / 14.2


_PARTS: dict[str, tuple[Part, ...]] = {
    "circle": ((_disc(1.0), "own"),),
    "square": ((_box(-0.88, -0.88, 0.88, 0.88), "own"),),
    "triangle": ((_mirrored((0.0, -1.1), (1.2, 1.1)), "own"),),
    "diamond": ((_mirrored((0.0, -1.2), (1.2, 0.0), (0.0, 1.2)), "own"),),
    "cross": (
        (_box(-0.41, -1.15, 0.41, 1.15), "own"),
        (_box(-1.15, -0.41, 1.15, 0.41), "own"),
    ),
    "star": ((_star(5, 1.3, 0.6), "own"),),
    "heart": ((_heart(), "own"),),
    "hexagon": ((_disc(1.12)[::16], "own"),),
    "ring": ((_disc(1.15), "own"), (_disc(0.6), "hole")),
    "moon": ((np.concatenate([_arc(1.2, 0.0, 0.0, 54.0, 306.0),
                              _arc(0.99, 0.52, 0.0, 281.3, 78.7)]), "own"),),
    "house": (
        (_box(-0.85, -0.15, 0.85, 1.1), "own"),
        (_mirrored((0.0, -1.15), (1.15, -0.1)), "dark"),
        (_box(-0.22, 0.45, 0.22, 1.1), "light"),
    ),
    "tree": (
        (_box(-0.2, 0.6, 0.2, 1.2), "dark"),
        (_mirrored((0.0, -1.25), (0.6, -0.45), (0.34, -0.45), (0.85, 0.2), (0.5, 0.2),
                   (1.05, 0.85)), "own"),
    ),
    "sun": ((_star(12, 1.25, 0.88), "own"), (_disc(0.62), "light")),
    "cloud": (
        (_disc(0.5, -0.65, 0.2), "own"),
        (_disc(0.72, 0.0, -0.15), "own"),
        (_disc(0.5, 0.65, 0.2), "own"),
        (_box(-0.65, 0.0, 0.65, 0.7), "own"),
    ),
    "flower": (
        *((_disc(0.44, 0.7 * math.cos(k * math.pi / 3), 0.7 * math.sin(k * math.pi / 3)), "own")
          for k in range(6)),
        (_disc(0.5), "own"),
        (_disc(0.36), "light"),
    ),
    "boat": (
        (_mirrored((1.2, 0.45), (0.8, 1.1)), "own"),
        (_box(-0.06, -1.15, 0.06, 0.45), "dark"),
        (_polygon((0.06, -1.1), (1.0, 0.3), (0.06, 0.3)), "light"),
        (_polygon((-0.06, -0.8), (-0.06, 0.3), (-0.8, 0.3)), "light"),
    ),
}  # fmt: skip
SHAPES: tuple[str, ...] = tuple(_PARTS)


@cache
def parts_of(shape: str) -> tuple[Part, ...]:
    """Return the parts of a shape in the order of drawing, its bounding box centred on 0."""
    corners = np.concatenate([polygon for polygon, _ in _PARTS[shape]])
    centre = (corners.min(axis=0) + corners.max(axis=0)) / 2
    return tuple((polygon - centre, shade) for polygon, shade in _PARTS[shape])


@cache
def outline_bottom(shape: str) -> float:
    """Return the distance from the centre of the bounding box to its bottom, in radii."""
    return float(max(polygon[:, 1].max() for polygon, _ in parts_of(shape)))


def shades_of(colour: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
    """Return the RGB values of each shade of a colour."""
    light = tuple(round(value + _LIGHT * (255 - value)) for value in colour)
    dark = tuple(round(value * (1.0 - _DARK)) for value in colour)
    return {"own": colour, "light": light, "dark": dark}


def coverage(
    parts: tuple[Part, ...], radius: float, centre: tuple[float, float], size: tuple[int, int]
) -> Image.Image:
    """Draw the share of each pixel that polygons cover, as an "L" picture of `size`.

    Args:
        parts: The polygons; holes are cut out of those before them.
        radius: Pixels of a unit of the polygons.
        centre: Where (0, 0) of the polygons is, (x, y) in pixels.
        size: Width and height in pixels.
    """
    mask = Image.new("L", (size[0] * SUPERSAMPLING, size[1] * SUPERSAMPLING), 0)
    pen = ImageDraw.Draw(mask)
    for polygon, shade in parts:
        # Pillow puts pixel centres at whole numbers; here they are half a pixel further.
        points = (polygon * radius + np.array(centre)) * SUPERSAMPLING - 0.5
        pen.polygon([(x, y) for x, y in points.tolist()], fill=0 if shade == "hole" else 255)
    return mask.reduce(SUPERSAMPLING)


def draw_shape(picture: Image.Image, shape: str, colour: tuple[int, int, int], radius: float,
               centre: tuple[float, float]) -> None:  # fmt: skip
    """Draw a shape onto an RGB picture; radius and centre (x, y) of its bounding box in pixels."""
    # Only the box around the shape is drawn: large pictures take no longer than small ones.
    reach = math.ceil(1.4 * radius) + 1
    left, top = math.floor(centre[0]) - reach, math.floor(centre[1]) - reach
    size = (2 * reach + 1, 2 * reach + 1)
    inside = (centre[0] - left, centre[1] - top)
    parts, shades = parts_of(shape), shades_of(colour)
    groups: list[list[Part]] = []  # neighbours of one shade, and the holes in them, drawn at once
    for part in parts:
        if groups and part[1] in (groups[-1][0][1], "hole"):
            groups[-1].append(part)
        else:
            groups.append([part])
    for group in groups:
        mask = coverage(tuple(group), radius, inside, size)
        fill = Image.new("RGB", size, shades[group[0][1]])
        picture.paste(fill, (left, top), mask)
