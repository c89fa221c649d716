"""Score pictures: which attributes of an expected scene a picture shows, and how sharply."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import combinations, permutations

import numpy as np
from PIL import Image

from localdit.scenes.recognition import MOST_FRAGMENTS, SeenObject, read_picture
from localdit.scenes.scene import Scene, draw_scene, nearest_position, relation_between

ATTRIBUTES: tuple[str, ...] = (
    "background", "count", "shape", "colour", "size", "position", "relation", "all",
)  # fmt: skip


def score_picture(picture: Image.Image | np.ndarray, expected: Scene) -> dict[str, float]:
    """Return how much of a scene a picture shows.

    Args:
        picture: An RGB picture, or its values (height, width, 3) in 0..255.
        expected: The scene that it should show.

    Returns:
        The share that is right, in [0, 1], for each of `ATTRIBUTES` that applies (position to one
        object, relation to several): "shape" is 0.5 if one of two shapes is right, "relation" 1/3
        if one pair of three objects is. "all" is 1.0 if everything is right, otherwise 0.0.
    """
    background, seen = read_picture(picture)
    verdict: dict[str, float] = {
        "background": float(background == expected.background),
        "count": float(len(seen) == len(expected.objects)),
    }
    # Match what is seen with the objects: the best match counts, by looks first, then by place.
    number = len(expected.objects)
    candidates = [*seen[:MOST_FRAGMENTS], *[None] * number]
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


def _compare(chosen: tuple[SeenObject | None, ...], expected: Scene) -> dict[str, float]:
    pairs = list(zip(chosen, expected.objects, strict=True))
    shares: dict[str, float] = {}
    for look in ("shape", "colour", "size"):
        right = [seen is not None and getattr(seen, look) == getattr(thing, look)
                 for seen, thing in pairs]  # fmt: skip
        shares[look] = sum(right) / len(right)
    if len(chosen) == 1:
        seen, thing = pairs[0]
        found = None if seen is None else nearest_position(seen.x, seen.y)
        return shares | {"position": float(found == thing.position)}
    relations = [
        None if first is None or second is None
        else relation_between((first.x, first.y), (second.x, second.y))
        for first, second in combinations(chosen, 2)
    ]  # fmt: skip
    right = [found == true for found, true in zip(relations, expected.relations, strict=True)]
    return shares | {"relation": sum(right) / len(right)}


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
