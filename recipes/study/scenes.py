"""Scenes that ask for coordination over a distance: drawing, captions and a scorer.

    python recipes/study/scenes.py --output output/study/scenes --count 4000

Writes `images/00000.png` and so on, 128 x 128 pixels, and `metadata.jsonl` with `file_name`, `text`
and `scene`. A caption leaves out what the far parts of its picture have to agree on:

- corners: two objects of named colours in opposite corners. The caption names no corner.
- pair: an object in the left half and one in the right, of one colour. The caption names no colour.
- mirror: the right half mirrors the left. The caption does not describe the shapes.
- count: one to five equal objects. The caption names number and colour, and no places.
- frame: a closed frame of one colour and constant width. The caption names neither.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from localdit.scenes.scene import PALETTE, SceneObject, coverage
from localdit.scenes.score import connected_components

SIDE = 128
TASKS = ("corners", "pair", "mirror", "count", "frame")
COLOURS = ("red", "green", "blue", "orange", "purple", "black")
SHAPES = ("circle", "square", "triangle")
BACKGROUND = "white"
MOST = 5  # objects to count

_NEAR, _FAR, _JITTER = 0.2, 0.8, 0.05  # of the side
_CELLS = [(x, y) for x in (0.2, 0.5, 0.8) for y in (0.2, 0.5, 0.8)]
_LEFT_CELLS = [(x, y) for x in (0.14, 0.36) for y in (0.2, 0.5, 0.8)]

# The scorer's tolerances.
_LEAST_AREA = 0.006  # of the picture; a small object covers 0.025
_LEAST_MIRRORED = 0.7  # intersection over union of a pattern and its mirror image
_LEAST_PURE = 0.95  # share of a blob's inner cells that have its colour
_MOST_UNEVEN = 2  # cells between the thinnest and the thickest part of a frame
_CELL = 2  # pixels per side of a cell, which has one colour


@dataclass(frozen=True)
class Study:
    """A scene: the task, the words of its caption, and what is drawn.

    Args:
        task: one of `TASKS`.
        colours: that the caption names, one for each object or one for all.
        number: of objects.
        objects: what is drawn; for "mirror" the left half, for "frame" nothing.
        frame: for "frame", its colour, margin and width in pixels.
    """

    task: str
    colours: tuple[str, ...] = ()
    number: int = 0
    objects: tuple[SceneObject, ...] = ()
    frame: tuple[str, int, int] | None = None

    @property
    def caption(self) -> str:
        """The caption, in lower-case English."""
        shapes = [thing.shape for thing in self.objects]
        if self.task == "corners":
            first, second = (f"{c} {s}" for c, s in zip(self.colours, shapes, strict=True))
            return f"{first} and {second}, corner to corner"
        if self.task == "pair":
            return f"a {shapes[0]} on the left and a {shapes[1]} on the right"
        if self.task == "count":
            return f"{self.number} {self.colours[0]} {shapes[0]}" + "s" * (self.number > 1)
        return {"mirror": "a mirror", "frame": "a frame"}[self.task]


def sample(rng: np.random.Generator, task: str) -> Study:
    """Draw a scene of a task at random."""

    def one(words: tuple[str, ...]) -> str:
        return words[int(rng.integers(len(words)))]

    def place(shape: str, colour: str, x: float, y: float) -> SceneObject:
        dx, dy = rng.uniform(-_JITTER, _JITTER, 2).tolist()
        return SceneObject(shape, colour, "small", x + dx, y + dy)

    if task == "corners":
        first, second = (COLOURS[i] for i in rng.choice(len(COLOURS), 2, replace=False))
        x, y = (float(rng.choice((_NEAR, _FAR))) for _ in range(2))
        a, b = place(one(SHAPES), first, x, y), place(one(SHAPES), second, 1 - x, 1 - y)
        return Study(task, (first, second), 2, (a, b))
    if task == "pair":
        colour, ys = one(COLOURS), rng.uniform(_NEAR, _FAR, 2)
        places = zip((_NEAR, _FAR), ys, strict=True)
        return Study(task, (), 2, tuple(place(one(SHAPES), colour, x, float(y)) for x, y in places))
    if task == "mirror":
        cells = rng.choice(len(_LEFT_CELLS), int(rng.integers(2, 4)), replace=False)
        objects = []
        for x, y in (_LEFT_CELLS[i] for i in cells):
            thing = place(one(SHAPES), one(COLOURS), x, y)
            objects.append(SceneObject(thing.shape, thing.colour, "small", x, thing.y))
        return Study(task, (), 2 * len(objects), tuple(objects))
    if task == "count":
        number, colour, shape = int(rng.integers(1, MOST + 1)), one(COLOURS), one(SHAPES)
        cells = rng.choice(len(_CELLS), number, replace=False)
        return Study(
            task, (colour,), number, tuple(place(shape, colour, *_CELLS[i]) for i in cells)
        )
    return Study(task, frame=(one(COLOURS), int(rng.integers(4, 17)), int(rng.integers(12, 21))))


def sample_many(count: int, seed: int) -> Iterator[Study]:
    """Yield `count` scenes, the tasks in turns; each depends only on `seed` and its index."""
    for index in range(count):
        yield sample(np.random.default_rng([seed, index]), TASKS[index % len(TASKS)])


def draw(scene: Study) -> Image.Image:
    """Draw a scene, 128 x 128 pixels."""
    picture = Image.new("RGB", (SIDE, SIDE), PALETTE[BACKGROUND])
    for thing in scene.objects:
        picture.paste(PALETTE[thing.colour], (0, 0, SIDE, SIDE), coverage(thing, SIDE))
    if scene.task == "mirror":
        left = np.asarray(picture)[:, : SIDE // 2]
        return Image.fromarray(np.concatenate([left, left[:, ::-1]], axis=1))
    if scene.frame:
        colour, margin, width = scene.frame
        for name, inset in ((colour, margin), (BACKGROUND, margin + width)):
            picture.paste(PALETTE[name], (inset, inset, SIDE - inset, SIDE - inset))
    return picture


# The scorer


@dataclass(frozen=True)
class Blob:
    """A connected part of the foreground: its colour, its purity, and its centre in [0, 1]."""

    colour: str
    pure: bool
    x: float
    y: float


def is_right(picture: Image.Image, scene: Study) -> bool:
    """Return whether a picture shows what its caption asks for; shapes and places are free.

    Args:
        picture: RGB, 128 x 128 pixels.
        scene: only its task, the colours that the caption names, and the number count.
    """
    labels = colour_labels(picture)
    if scene.task == "mirror":
        return mirrored(labels) >= _LEAST_MIRRORED and len(blobs(labels)) >= 4
    if scene.task == "frame":
        return is_frame(labels)
    seen = blobs(labels)
    if len(seen) != scene.number or not all(blob.pure for blob in seen):
        return False
    colours = [blob.colour for blob in seen]
    if scene.task == "count":
        return set(colours) == set(scene.colours)
    first, second = seen
    across = (first.x < 0.5) != (second.x < 0.5)
    if scene.task == "pair":
        return across and colours[0] == colours[1]
    return across and (first.y < 0.5) != (second.y < 0.5) and set(colours) == set(scene.colours)


def colour_labels(picture: Image.Image) -> np.ndarray:
    """Return the index in `COLOURS` of each cell's nearest colour, (64, 64); -1: the background."""
    pixels = np.asarray(picture.reduce(_CELL), dtype=np.float32)
    palette = np.array([PALETTE[name] for name in (BACKGROUND, *COLOURS)], dtype=np.float32)
    distances = np.square(pixels[..., None, :] - palette).sum(axis=-1)
    return distances.argmin(axis=-1) - 1


def blobs(labels: np.ndarray) -> list[Blob]:
    """Return the connected parts of the foreground that are no specks."""
    found = []
    for mask in connected_components(labels >= 0):
        if mask.mean() < _LEAST_AREA:
            continue
        inner = labels[_eroded(mask)]  # on the rim, two colours mix into others
        inner = inner if inner.size else labels[mask]
        counts = np.bincount(inner, minlength=len(COLOURS))
        rows, columns = np.nonzero(mask)
        found.append(
            Blob(
                COLOURS[int(counts.argmax())],
                bool(counts.max() >= _LEAST_PURE * counts.sum()),
                float(columns.mean() + 0.5) / mask.shape[1],
                float(rows.mean() + 0.5) / mask.shape[0],
            )
        )
    return found


def mirrored(labels: np.ndarray) -> float:
    """Return the intersection over union of a pattern and its mirror image, colours included."""
    flipped = labels[:, ::-1]
    union = (labels >= 0) | (flipped >= 0)
    return float(((labels == flipped) & union).sum() / max(union.sum(), 1))


def is_frame(labels: np.ndarray) -> bool:
    """Return whether a picture shows one closed frame of one colour and constant width."""
    parts = [mask for mask in connected_components(labels >= 0) if mask.mean() >= _LEAST_AREA]
    if len(parts) != 1:
        return False
    frame = parts[0]
    inner = labels[_eroded(frame)]
    if not inner.size or np.bincount(inner).max() < _LEAST_PURE * inner.size:
        return False
    middle = len(frame) // 2
    hole = next((m for m in connected_components(~frame) if m[middle, middle]), None)
    if hole is None or hole[0].any() or hole[-1].any() or hole[:, 0].any() or hole[:, -1].any():
        return False
    # Across each side, where it faces the hole: the number of the frame's cells.
    rows, columns = (_inner_half(np.flatnonzero(hole.any(axis=axis))) for axis in (1, 0))
    halves = np.split(frame[rows], 2, axis=1) + np.split(frame[:, columns].T, 2, axis=1)
    widths = np.concatenate([half.sum(axis=1) for half in halves])
    return bool(widths.max() - widths.min() <= _MOST_UNEVEN and hole.mean() > 0.1)


def _inner_half(indices: np.ndarray) -> np.ndarray:
    """Leave out a quarter at both ends."""
    quarter = len(indices) // 4
    return indices[quarter : len(indices) - quarter]


def _eroded(mask: np.ndarray) -> np.ndarray:
    """Remove the cells of a mask that have a 4-neighbour outside of it."""
    wide = np.pad(mask, 1)
    return mask & wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--count", type=int, default=4000, help="number of pictures")
    parser.add_argument("--seed", type=int, default=0, help="seed of the scenes")
    args = parser.parse_args()
    (args.output / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for index, scene in enumerate(sample_many(args.count, args.seed)):
        name = f"images/{index:05d}.png"
        draw(scene).save(args.output / name)
        lines.append(json.dumps({"file_name": name, "text": scene.caption, "scene": asdict(scene)}))
    (args.output / "metadata.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main()
