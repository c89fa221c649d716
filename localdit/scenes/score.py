"""Score pictures: which attributes of an expected scene a picture shows, from its pixels."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from PIL import Image, ImageDraw

from localdit.scenes.scene import (
    COLOURS,
    PALETTE,
    SHAPES,
    SIZE_RADIUS,
    SUPERSAMPLING,
    Scene,
    SceneObject,
    draw_scene,
    nearest_position,
    outline,
    relation_between,
)

ATTRIBUTES: tuple[str, ...] = (
    "background", "count", "shape", "colour", "size", "position", "relation", "all",
)  # fmt: skip

_CONTRAST = 40.0  # RGB distance from the background; the two nearest colours are 93 apart
_LEAST_AREA = 0.006  # of the picture; a small shape covers 0.025
_MOST_BLOBS = 6  # largest blobs that are compared with the objects of the scene
_LEAST_OVERLAP = 0.7  # with the best template; below this the shape is unknown
_PALETTE = np.array(list(PALETTE.values()), dtype=np.float64)


@dataclass(frozen=True)
class SeenObject:
    """One blob of a picture: shape (None if unlike any), colour, size and centre in [0, 1]."""

    shape: str | None
    colour: str
    size: str
    x: float
    y: float


def score_picture(picture: Image.Image | np.ndarray, expected: Scene) -> dict[str, float]:
    """Return how much of a scene a picture shows.

    Args:
        picture: An RGB picture, or its values (height, width, 3) in 0..255.
        expected: The scene that it should show.

    Returns:
        The share that is right, in [0, 1], for each of `ATTRIBUTES` that applies (position to one
        object, relation to two): "shape" is 0.5 if one of two shapes is right. "all" is 1.0 if
        everything is right, otherwise 0.0.
    """
    background, seen = read_picture(picture)
    verdict: dict[str, float] = {
        "background": float(background == expected.background),
        "count": float(len(seen) == len(expected.objects)),
    }
    # Match blobs with objects: the best match counts, by looks first, then by relation.
    number = len(expected.objects)
    candidates = [*seen[:_MOST_BLOBS], *[None] * number]
    readings = [_compare(chosen, expected) for chosen in permutations(candidates, number)]
    looks = ("shape", "colour", "size")
    best = max(readings, key=lambda r: (sum(r[look] for look in looks), sum(r.values())))
    verdict = {**verdict, **best}
    return {**verdict, "all": float(all(share == 1.0 for share in verdict.values()))}


def mean_scores(scores: Iterable[dict[str, float]]) -> dict[str, float]:
    """Return the mean of each attribute over the pictures to which it applies."""
    collected: dict[str, list[float]] = {}
    for score in scores:
        for name, value in score.items():
            collected.setdefault(name, []).append(value)
    return {name: float(np.mean(collected[name])) for name in ATTRIBUTES if name in collected}


def read_picture(picture: Image.Image | np.ndarray) -> tuple[str, list[SeenObject]]:
    """Return the colour of the background and the objects on it, largest first.

    Raises:
        ValueError: if the picture is not (height, width, 3).
    """
    pixels = np.asarray(picture, dtype=np.float64)  # (h, w, 3)
    if pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"expected an RGB picture (height, width, 3), got {pixels.shape}")
    ground = _background(pixels)
    foreground = np.linalg.norm(pixels - ground, axis=-1) > _CONTRAST
    blobs = [blob for blob in connected_components(foreground) if blob.mean() > _LEAST_AREA]
    blobs.sort(key=lambda blob: -int(blob.sum()))
    return _nearest_colour(ground), [_read_blob(pixels, blob, ground) for blob in blobs]


def reported_scene(picture: Image.Image | np.ndarray) -> Scene | None:
    """Return the scene that a picture shows; None if it shows no scene.

    Raises:
        ValueError: if the picture is not (height, width, 3).
    """
    background, seen = read_picture(picture)
    try:
        objects = (SceneObject(str(one.shape), one.colour, one.size, one.x, one.y) for one in seen)
        return Scene(background, tuple(objects))
    except ValueError:  # an unknown shape, an object of the background's colour, too many or none
        return None


def edge_contrast(picture: Image.Image, scene: Scene) -> float:
    """Return the contrast of a square picture across the edges of a scene's true drawing.

    It is the inner product of the gradients of picture and drawing, divided by that of the
    drawing's with themselves: 1 for the drawing, and less for blurred or displaced edges.
    """
    shown, true = (_gradient(one) for one in (picture, draw_scene(scene, picture.width)))
    return float(shown @ true / (true @ true))


def _gradient(picture: Image.Image) -> np.ndarray:
    """Return the differences of neighbouring pixels, as one vector."""
    pixels = np.asarray(picture, dtype=np.float64)
    return np.concatenate([np.diff(pixels, axis=axis).ravel() for axis in (0, 1)])


def psnr(picture: Image.Image, other: Image.Image) -> float:
    """Return the peak signal-to-noise ratio of two pictures of one size, in dB."""
    first, second = (np.asarray(one, dtype=np.float64) for one in (picture, other))
    error = max(float(np.mean((first - second) ** 2)), 1e-10)
    return 20 * math.log10(255.0) - 10 * math.log10(error)


def connected_components(mask: np.ndarray) -> list[np.ndarray]:
    """Split a mask (h, w) into its 4-connected parts, each a mask (h, w)."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:  # the largest label of each part spreads over the part
        spread = np.pad(labels, 1)
        spread = np.maximum.reduce([
            spread[1:-1, 1:-1], spread[:-2, 1:-1], spread[2:, 1:-1],
            spread[1:-1, :-2], spread[1:-1, 2:],
        ])  # fmt: skip
        spread = np.where(mask, spread, 0)
        if np.array_equal(spread, labels):
            return [labels == label for label in np.unique(labels) if label]
        labels = spread


def _background(pixels: np.ndarray) -> np.ndarray:
    """Return the median of the border pixels of the most frequent colour, (3,)."""
    sides = (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:])
    border = np.concatenate([side.reshape(-1, 3) for side in sides])
    labels = np.linalg.norm(border[:, None] - _PALETTE, axis=-1).argmin(axis=1)
    return np.median(border[labels == np.bincount(labels).argmax()], axis=0)


def _nearest_colour(colour: np.ndarray) -> str:
    return COLOURS[int(np.linalg.norm(_PALETTE - colour, axis=-1).argmin())]


def _read_blob(pixels: np.ndarray, blob: np.ndarray, ground: np.ndarray) -> SeenObject:
    height, width = blob.shape
    own = np.median(pixels[blob], axis=0)
    away = own - ground
    # The share of each pixel that the object covers; a rim pixel mixes two colours.
    rim = np.pad(blob, 1)
    near = blob | rim[:-2, 1:-1] | rim[2:, 1:-1] | rim[1:-1, :-2] | rim[1:-1, 2:]
    cover = np.clip((pixels - ground) @ away / (away @ away), 0.0, 1.0) * near  # (h, w)
    overlaps = {shape: _overlap(cover, shape) for shape in SHAPES}
    shape = max(overlaps, key=lambda name: overlaps[name])
    radius = _radius(cover, shape) / min(height, width)
    rows, columns = np.flatnonzero(cover.max(axis=1) > 0.5), np.flatnonzero(cover.max(axis=0) > 0.5)
    return SeenObject(
        shape=shape if overlaps[shape] >= _LEAST_OVERLAP else None,
        colour=_nearest_colour(own),
        size=min(SIZE_RADIUS, key=lambda size: abs(np.log(radius / SIZE_RADIUS[size]))),
        x=float(columns[0] + columns[-1] + 1) / (2 * width),
        y=float(rows[0] + rows[-1] + 1) / (2 * height),
    )


def _radius(cover: np.ndarray, shape: str) -> float:
    """Return the radius in pixels of a shape with the area of the blob."""
    return float(np.sqrt(cover.sum() / _area_and_centroid(outline(shape))[0]))


def _area_and_centroid(corners: np.ndarray) -> tuple[float, np.ndarray]:
    """Return area and centroid (x, y) of a polygon with corners (n, 2)."""
    following = np.roll(corners, -1, axis=0)
    cross = corners[:, 0] * following[:, 1] - following[:, 0] * corners[:, 1]
    area = cross.sum() / 2.0
    return abs(float(area)), ((corners + following) * cross[:, None]).sum(axis=0) / (6.0 * area)


def _overlap(cover: np.ndarray, shape: str) -> float:
    """Return the intersection over union of a blob and a shape of its area and centroid."""
    height, width = cover.shape
    centroid = np.array([
        (cover.sum(axis=0) * (np.arange(width) + 0.5)).sum(),
        (cover.sum(axis=1) * (np.arange(height) + 0.5)).sum(),
    ]) / cover.sum()  # fmt: skip
    corners = outline(shape)
    corners = (corners - _area_and_centroid(corners)[1]) * _radius(cover, shape) + centroid
    fine = Image.new("L", (width * SUPERSAMPLING, height * SUPERSAMPLING), 0)
    points = (corners * SUPERSAMPLING - 0.5).tolist()
    ImageDraw.Draw(fine).polygon([(x, y) for x, y in points], fill=255)
    template = np.asarray(fine.reduce(SUPERSAMPLING), dtype=np.float64) / 255.0
    return float(np.minimum(cover, template).sum() / np.maximum(cover, template).sum())


def _compare(chosen: tuple[SeenObject | None, ...], expected: Scene) -> dict[str, float]:
    pairs = list(zip(chosen, expected.objects, strict=True))
    shares: dict[str, float] = {}
    for look in ("shape", "colour", "size"):
        right = [seen is not None and getattr(seen, look) == getattr(thing, look)
                 for seen, thing in pairs]  # fmt: skip
        shares[look] = float(np.mean(right))
    centres = [(seen.x, seen.y) for seen in chosen if seen is not None]
    complete = len(centres) == len(chosen)
    if expected.relation is None:
        name, right_place = "position", expected.objects[0].position
        found = nearest_position(*centres[0]) if complete else None
    else:
        name, right_place = "relation", expected.relation
        found = relation_between(centres[0], centres[1]) if complete else None
    return shares | {name: float(found == right_place)}
