"""Random scenes, and the split into training and held-out scenes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from localdit.scenes.scene import (
    COLOURS,
    POSITION_CENTRE,
    POSITIONS,
    RELATION_DIRECTION,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
)

HELD_OUT_PERCENT = 10
_JITTER = 0.02  # of the side; keeps large shapes inside the picture and apart
_SLIDE = 0.08  # largest shift of two objects across the axis of their relation


def is_held_out(scene: Scene) -> bool:
    """Return whether a scene is held out for evaluation.

    A tenth of the triples (shape, colour, background) and a tenth of the unordered pairs
    {(shape, colour), (shape, colour)} are held out, by a hash of the words. A scene with any
    held-out triple or pair is never used for training.
    """
    return any(_hash_percent(key) < HELD_OUT_PERCENT for key in _combinations(scene))


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


def _combinations(scene: Scene) -> list[str]:
    things = sorted(f"{thing.colour} {thing.shape}" for thing in scene.objects)
    keys = [f"{thing} on {scene.background}" for thing in things]
    return [*keys, " and ".join(things)] if len(things) == 2 else keys


def _hash_percent(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 100


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
