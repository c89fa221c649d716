"""Scenes that ask for coordination over a distance: drawing, captions and a scorer.

    python recipes/study/scenes.py --output output/study/scenes --count 20000

Writes `images/00000.png` and so on, 16 x 16 pixels, and `metadata.jsonl` with `file_name` and
`text`. An object is a square of 3 x 3 pixels. A caption leaves out what the far parts of its
picture have to agree on:

- corners: two objects of named colours in opposite corners. The caption names no corner.
- pair: an object on the left and one on the right, of one colour. The caption names no colour.
- mirror: the right half mirrors the left. The caption does not describe it.
- count: one to five equal objects. The caption names number and colour, and no places.
- frame: a closed frame of one colour and constant width. The caption names neither.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from localdit.files import start_drawing, write_whole
from localdit.scenes.recognition import connected_components
from localdit.scenes.scene import PALETTE

SIDE = 16
OBJECT = 3  # pixels per side of an object
TASKS = ("corners", "pair", "mirror", "count", "frame")
BACKGROUND, *COLOURS = "white", "red", "green", "blue", "black"
MOST = 5  # objects to count

_GRID = (1, 6, 11)  # left or upper edges of 3 x 3 cells; an object is moved by up to a pixel
_LEFT = (0, 4)  # left edges of the columns in the left half

_LEAST_AREA = 4  # pixels; smaller parts are specks
_LEAST_PURE = 0.85  # share of an object's or frame's pixels that have its colour
_LEAST_MIRRORED = 0.8  # intersection over union of a pattern and its mirror image
_LEAST_HOLE = 49  # pixels within a frame; a true one has at least 64
_LEAST_EVEN = 0.9  # share of the places along a frame that have its width


@dataclass(frozen=True)
class Square:
    """An object: its colour, and its left and upper edge in pixels."""

    colour: str
    x: int
    y: int


@dataclass(frozen=True)
class Study:
    """A scene.

    Args:
        task: one of `TASKS`.
        objects: what is drawn; for "mirror" the left half, for "frame" nothing.
        frame: for "frame", its colour, margin and width in pixels.
    """

    task: str
    objects: tuple[Square, ...] = ()
    frame: tuple[str, int, int] = ("", 0, 0)

    @property
    def caption(self) -> str:
        """The caption, in lower-case English."""
        colours = [thing.colour for thing in self.objects]
        if self.task == "corners":
            return f"a {colours[0]} square and a {colours[1]} square, corner to corner"
        if self.task == "count":
            return f"{len(colours)} {colours[0]} square" + "s" * (len(colours) > 1)
        return {
            "pair": "a square on the left and a square on the right",
            "mirror": "a mirror",
            "frame": "a frame",
        }[self.task]


def sample(rng: np.random.Generator, task: str) -> Study:
    """Draw a scene of a task at random."""

    def number(low: int, high: int) -> int:
        return int(rng.integers(low, high + 1))

    def colours(count: int, different: bool = False) -> list[str]:
        return [COLOURS[i] for i in rng.choice(len(COLOURS), count, replace=not different)]

    far = SIDE - OBJECT
    if task == "corners":
        (x, y), (left, up) = rng.integers(0, 3, 2).tolist(), rng.integers(0, 2, 2).tolist()
        dx, dy = rng.integers(0, 3, 2).tolist()
        first, second = colours(2, different=True)
        places = (x if left else far - x, y if up else far - y)
        opposite = (far - dx if left else dx, far - dy if up else dy)
        return Study(task, (Square(first, *places), Square(second, *opposite)))
    if task == "pair":
        (colour,) = colours(1)
        left = Square(colour, number(0, 2), number(0, far))
        return Study(task, (left, Square(colour, far - number(0, 2), number(0, far))))
    if task == "mirror":
        cells = [(x, y) for x in _LEFT for y in _GRID]
        chosen = rng.choice(len(cells), number(2, 3), replace=False)
        looks = zip(colours(len(chosen)), (cells[i] for i in chosen), strict=True)
        return Study(task, tuple(Square(c, x, y + number(0, 1)) for c, (x, y) in looks))
    if task == "count":
        cells = [(x, y) for x in _GRID for y in _GRID]
        (colour,), chosen = colours(1), rng.choice(len(cells), number(1, MOST), replace=False)
        places = ((x + number(0, 1), y + number(0, 1)) for x, y in (cells[i] for i in chosen))
        return Study(task, tuple(Square(colour, x, y) for x, y in places))
    return Study(task, frame=(colours(1)[0], number(0, 1), number(2, 3)))


def sample_many(count: int, seed: int) -> Iterator[Study]:
    """Yield `count` scenes, the tasks in turns; each depends only on `seed` and its index."""
    for index in range(count):
        yield sample(np.random.default_rng([seed, index]), TASKS[index % len(TASKS)])


def draw(scene: Study) -> Image.Image:
    """Draw a scene, 16 x 16 pixels."""
    picture = Image.new("RGB", (SIDE, SIDE), PALETTE[BACKGROUND])
    for thing in scene.objects:
        box = (thing.x, thing.y, thing.x + OBJECT, thing.y + OBJECT)
        picture.paste(PALETTE[thing.colour], box)
    if scene.task == "mirror":
        left = np.asarray(picture)[:, : SIDE // 2]
        return Image.fromarray(np.concatenate([left, left[:, ::-1]], axis=1))
    if scene.task == "frame":
        colour, margin, width = scene.frame
        for name, inset in ((colour, margin), (BACKGROUND, margin + width)):
            picture.paste(PALETTE[name], (inset, inset, SIDE - inset, SIDE - inset))
    return picture


# The scorer


@dataclass(frozen=True)
class Part:
    """A connected part of the foreground.

    Attributes:
        mask: its pixels, (16, 16).
        colour: the most frequent colour.
        pure: whether nearly all of its pixels have this colour.
    """

    mask: np.ndarray
    colour: str
    pure: bool

    @property
    def is_left(self) -> bool:
        """True if the centre is in the left half."""
        return bool(np.nonzero(self.mask)[1].mean() < (SIDE - 1) / 2)

    @property
    def is_upper(self) -> bool:
        """True if the centre is in the upper half."""
        return bool(np.nonzero(self.mask)[0].mean() < (SIDE - 1) / 2)


def is_right(picture: Image.Image, scene: Study) -> bool:
    """Return whether a picture shows what its caption asks for.

    Args:
        picture: RGB, 16 x 16 pixels.
        scene: its task, and the number and colours of its objects if the caption names them.
    """
    labels = colour_labels(picture)
    parts = foreground(labels)
    if scene.task == "mirror":
        return len(parts) >= 4 and mirrored(labels) >= _LEAST_MIRRORED
    if not all(part.pure for part in parts):
        return False
    if scene.task == "frame":
        return len(parts) == 1 and is_frame(parts[0].mask)
    colours, named = ([one.colour for one in group] for group in (parts, scene.objects))
    if len(colours) != len(named):
        return False
    if scene.task == "count":
        return colours == named
    first, second = parts
    across = first.is_left != second.is_left
    if scene.task == "pair":
        return across and colours[0] == colours[1]
    return across and first.is_upper != second.is_upper and set(colours) == set(named)


def colour_labels(picture: Image.Image) -> np.ndarray:
    """Return the index in `COLOURS` of each pixel's nearest colour, (16, 16); -1: background."""
    palette = np.array([PALETTE[name] for name in (BACKGROUND, *COLOURS)], dtype=np.float64)
    pixels = np.asarray(picture, dtype=np.float64)
    return np.square(pixels[..., None, :] - palette).sum(axis=-1).argmin(axis=-1) - 1


def foreground(labels: np.ndarray) -> list[Part]:
    """Return the connected parts of the foreground, without specks."""
    parts = []
    for mask in connected_components(labels >= 0):
        counts = np.bincount(labels[mask])
        if mask.sum() >= _LEAST_AREA:
            pure = bool(counts.max() >= _LEAST_PURE * counts.sum())
            parts.append(Part(mask, COLOURS[int(counts.argmax())], pure))
    return parts


def mirrored(labels: np.ndarray) -> float:
    """Return the intersection over union of a pattern and its mirror image, colours included."""
    flipped = labels[:, ::-1]
    union = (labels >= 0) | (flipped >= 0)
    return float(((labels == flipped) & union).sum() / max(union.sum(), 1))


def is_frame(mask: np.ndarray) -> bool:
    """Return whether a part is closed around the middle, with the same width at all its sides."""
    middle = SIDE // 2
    hole = next((part for part in connected_components(~mask) if part[middle, middle]), None)
    if hole is None or hole[[0, -1]].any() or hole[:, [0, -1]].any():
        return False
    # Across each side, where it faces the hole.
    rows, columns = hole.any(axis=1), hole.any(axis=0)
    sides = [*np.split(mask[rows], 2, axis=1), *np.split(mask[:, columns].T, 2, axis=1)]
    counts = np.bincount(np.concatenate([side.sum(axis=1) for side in sides]))
    return bool(counts.max() >= _LEAST_EVEN * counts.sum() and hole.sum() >= _LEAST_HOLE)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--count", type=int, default=20_000, help="number of pictures")
    parser.add_argument("--seed", type=int, default=0, help="seed of the scenes")
    args = parser.parse_args()
    metadata = start_drawing(args.output, args.count)
    lines = []
    for index, scene in enumerate(sample_many(args.count, args.seed)):
        name = f"images/{index:06d}.png"
        draw(scene).save(args.output / name)
        lines.append(json.dumps({"file_name": name, "text": scene.caption}))
    write_whole(metadata, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
