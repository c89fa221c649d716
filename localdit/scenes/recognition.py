"""Recognition of scenes: the background and the objects that a picture shows, from its pixels.

The background is the one whose drawing is nearest to the picture. What differs from it are objects:
each shape is drawn over the background where something differs, and compared with the picture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from itertools import permutations

import numpy as np
from PIL import Image

from localdit.scenes.scene import (
    BACKGROUNDS,
    COLOURS,
    PALETTE,
    SIZE_RADIUS,
    Background,
    Scene,
    SceneObject,
)
from localdit.scenes.shapes import SHAPES, draw_shape, parts_of

_SAMPLES = 32  # per side, of a picture whose background is read
_CLIP = 60.0  # most RGB distance of a sample from a background that counts; objects are farther
_CONTRAST = 40.0  # RGB distance of an object from the background; colours are 100 apart there
_EDGE = 30.0  # RGB distance of neighbouring pixels across a sharp edge of the background
_SLIVER = 2 / 256  # of the side; half the thickness of what is no object along such an edge
_LEAST_AREA = 0.003  # of the picture; the hull of a small boat covers 0.008
MOST_FRAGMENTS = 8  # largest that are compared with shapes; a picture with more is wrong anyway
_NEAR = 0.06  # of the side; largest gap between the fragments of an object
_LEAST_SHARE = 0.25  # of an object's pixels that are nearest to its colour
_MOST_STRETCH = 1.45  # ratio of the aspects of a blob and of a shape that may be it
_SURE = 0.9  # fit of a fragment that is a whole object
_LEAST_FIT = 0.85  # below this a shape is unknown; blurred drawings have 0.92
_MOST_SCALE = 0.3  # log of the ratio of an object's radius and that of a size
_MOST_STEP = 0.1  # of the radius, by which a shape is moved or scaled at once
_REFINED, _STEPS = 3, 2  # number of shapes that are moved for the best fit, and of moves
_MOST_GAIN = 0.15  # of the fit by the moves, or little more
_LEAST_GAIN = 1e-4  # of the fit by a move that is worth another
_SETTLING = (-0.12, -0.06, 0.06, 0.12)  # pixels; the drawing's own steps are a quarter of one
_PALETTE = np.array(list(PALETTE.values()), dtype=np.float32)

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels, as Pillow has them
Group = tuple[int, ...]  # indices of fragments


@dataclass(frozen=True)
class SeenObject:
    """One object of a picture: shape (None if unlike any), colour, size and centre in [0, 1]."""

    shape: str | None
    colour: str
    size: str
    x: float
    y: float


def read_picture(picture: Image.Image | np.ndarray) -> tuple[Background, list[SeenObject]]:
    """Return the background and the objects on it, largest first."""
    background, view = _view(picture)
    return background, [seen for seen, _ in _read_objects(view)]


def reported_scene(picture: Image.Image | np.ndarray) -> Scene | None:
    """Return the scene that a picture shows, placed to a tenth of a pixel, or None."""
    background, view = _view(picture)
    objects: list[SceneObject] = []
    for _, trial in _read_objects(view):
        if trial is None or len(objects) == 3:
            return None
        seen = trial.settled().seen()
        objects.append(SceneObject(trial.shape, seen.colour, seen.size, seen.x, seen.y))
    for order in permutations(objects):
        try:
            return Scene(background, order)
        except ValueError:  # a colour of the background, no object, or not the arrangement's order
            continue
    return None


def _view(picture: Image.Image | np.ndarray) -> tuple[Background, _View]:
    """Return the background of a picture, and what differs from it."""
    pixels = np.asarray(picture, dtype=np.float32)  # (h, w, 3)
    if pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"expected an RGB picture (height, width, 3), got {pixels.shape}")
    background, behind = _read_background(pixels)
    return background, _View(pixels, behind)


# The background


def _read_background(pixels: np.ndarray) -> tuple[Background, np.ndarray]:
    """Return the background of a picture (h, w, 3), and its pixels in the picture's own colours."""
    rows, columns = (_spread(_SAMPLES, length) for length in pixels.shape[:2])
    samples = pixels[rows][:, columns]  # (32, 32, 3)
    backgrounds, drawings = _drawings()
    away = np.sqrt(_squared(drawings - samples))  # (backgrounds, 32, 32)
    best = int(np.minimum(away, _CLIP).mean(axis=(1, 2)).argmin())
    bare = away[best] < _CLIP
    shift = np.median((samples - drawings[best])[bare], axis=0) if bare.any() else 0.0
    height, width = pixels.shape[:2]
    side = max(height, width)
    full = backgrounds[best].pixels(side).astype(np.float32)
    behind = full[_spread(height, side)][:, _spread(width, side)] + shift
    return backgrounds[best], np.clip(behind, 0.0, 255.0)


@cache
def _drawings() -> tuple[list[Background], np.ndarray]:
    """Return all backgrounds, and their pixels (backgrounds, 32, 32, 3)."""
    backgrounds = [Background(kind, colours) for kind, choices in BACKGROUNDS.items()
                   for colours in choices]  # fmt: skip
    return backgrounds, np.stack([one.pixels(_SAMPLES) for one in backgrounds]).astype(np.float32)


def _spread(count: int, length: int) -> np.ndarray:
    """Return `count` indices that are spread evenly over `length`."""
    return ((np.arange(count) + 0.5) * length / count).astype(np.intp)


# Objects


class _View:
    """A picture and what differs from its background.

    Attributes:
        pixels: The picture (h, w, 3).
        behind: Its background as a picture, for drawing on it.
        side: The smaller of height and width.
        fragments: Connected parts that differ from the background, masks (h, w), largest first.
    """

    def __init__(self, pixels: np.ndarray, behind: np.ndarray) -> None:
        self.pixels = pixels
        self.behind = Image.fromarray((behind + 0.5).astype(np.uint8))
        self.side = min(pixels.shape[:2])
        mask = _squared(pixels - behind) > _CONTRAST**2
        mask = _without_slivers(mask, behind, round(_SLIVER * self.side))
        self.fragments = _components(mask, _LEAST_AREA * mask.size)

    def united(self, group: Group) -> np.ndarray:
        """Return the union of some fragments, a mask (h, w)."""
        return np.any([self.fragments[i] for i in group], axis=0)


class _Trial:
    """A shape drawn over a picture's background where a blob is, to compare it with the picture.

    Attributes:
        shape, colour: What is drawn.
        radius, centre: Its place, in pixels.
        box: The part of the picture around shape and blob; the arrays below are of that part.
        drawn: The drawing (h, w, 3).
        region: Where drawing and picture are compared (h, w): on shape and blob, and just outside.
        fit: The share of what is seen there that the drawing explains, at most 1.
    """

    def __init__(self, view: _View, blob: np.ndarray, shape: str, colour: str, radius: float,
                 centre: tuple[float, float]) -> None:  # fmt: skip
        self.shape, self.colour, self.radius, self.centre = shape, colour, radius, centre
        self._view, self._blob = view, blob
        reach = radius * max(max(map(abs, extent)) for extent in _extents(shape))
        around = _box_of(blob)
        height, width = blob.shape
        left, top = (max(0, math.floor(min(around[i], centre[i] - reach)) - 3) for i in (0, 1))
        right = min(width, math.ceil(max(around[2], centre[0] + reach)) + 3)
        bottom = min(height, math.ceil(max(around[3], centre[1] + reach)) + 3)
        self.box = left, top, right, bottom
        patch = view.behind.crop(self.box)
        self._behind = np.asarray(patch, dtype=np.float32)
        draw_shape(patch, shape, PALETTE[colour], radius, (centre[0] - left, centre[1] - top))
        self.drawn = np.asarray(patch, dtype=np.float32)
        self._shown = view.pixels[top:bottom, left:right]
        added = _squared(self.drawn - self._behind)
        self.region = _grown(_grown((added > 0) | blob[top:bottom, left:right], 2, 0), 2, 1)
        missed = np.vdot(_squared(self._shown - self.drawn), self.region)
        seen = np.vdot(np.maximum(_squared(self._shown - self._behind), added), self.region)
        self.fit = 1.0 - float(missed / max(seen, 1.0))

    def nudged(self) -> _Trial:
        """Return the shape moved and scaled by a step of least squares."""
        slopes = np.stack([np.gradient(self.drawn, axis=axis) for axis in (1, 0)])
        still = self.region & ~_sharp(self._behind, 0) & ~_sharp(self._behind, 1)
        y, x = (np.nonzero(still)[i] + self.box[1 - i] + 0.5 - self.centre[1 - i] for i in (0, 1))
        right, down = slopes[:, still]  # (n, 3)
        outward = (x[:, None] * right + y[:, None] * down) / self.radius
        effects = -np.stack([right, down, outward], axis=-1).reshape(-1, 3)
        error = (self._shown - self.drawn)[still].ravel()
        step = np.linalg.lstsq(effects.T @ effects, effects.T @ error, rcond=None)[0]
        most = _MOST_STEP * self.radius
        across, along, growth = step.clip(-most, most).tolist()
        return self._moved(across, along, self.radius + growth)

    def settled(self) -> _Trial:
        """Return the shape in its size, at the place nearby where it fits best."""
        best = self._moved(0.0, 0.0, SIZE_RADIUS[self.seen().size] * self._view.side)
        for right, down in ((1, 0), (0, 1)):
            moved = [best._moved(right * by, down * by, best.radius) for by in _SETTLING]
            best = max(best, *moved, key=lambda trial: trial.fit)
        return best

    def _moved(self, right: float, down: float, radius: float) -> _Trial:
        centre = (self.centre[0] + right, self.centre[1] + down)
        return _Trial(self._view, self._blob, self.shape, self.colour, radius, centre)

    def covers(self, fragment: np.ndarray) -> bool:
        """Return whether most of a fragment (h, w) lies on the shape."""
        left, top, right, bottom = self.box
        inside = fragment[top:bottom, left:right] & self.region
        return int(inside.sum()) > fragment.sum() / 2

    def seen(self) -> SeenObject:
        """Return the shape as an object of the picture."""
        return _seen(self._view, self.shape, self.colour, self.radius, self.centre)


def _read_objects(view: _View) -> list[tuple[SeenObject, _Trial | None]]:
    """Return the objects of a picture, largest first; those of a known shape with its drawing."""
    left = set(range(len(view.fragments)))
    found: list[tuple[int, SeenObject, _Trial | None]] = []  # with the area
    for group, trial in _trials(view):
        if left.issuperset(group):
            left = {i for i in left.difference(group) if not trial.covers(view.fragments[i])}
            found.append((int(view.united(group).sum()), trial.seen(), trial))
    unknown = [view.fragments[i] for i in left]
    found += [(int(fragment.sum()), _unknown(view, fragment), None) for fragment in unknown]
    return [(seen, trial) for _, seen, trial in sorted(found, key=lambda one: -one[0])]


def _trials(view: _View) -> list[tuple[Group, _Trial]]:
    """Return the fragments, and groups of them, that are like shapes, those that fit best first."""
    fragments = range(min(len(view.fragments), MOST_FRAGMENTS))
    trials: dict[Group, _Trial | None] = {
        (i,): _best_trial(view, view.fragments[i]) for i in fragments
    }
    parts = [i for i in fragments if (one := trials[i,]) is None or one.fit < _SURE]
    for group in _groups(view, parts):
        trials[group] = _best_trial(view, view.united(group))
    found = [(group, one) for group, one in trials.items() if one and one.fit >= _LEAST_FIT]
    return sorted(found, key=lambda pair: -pair[1].fit)


def _groups(view: _View, parts: list[int]) -> set[Group]:
    """Return sets of two to four of the fragments `parts` that are close to each other."""
    boxes = {i: _box_of(view.fragments[i]) for i in parts}
    groups: set[Group] = set()
    for first in parts:
        near = sorted(parts, key=lambda i: _gap(boxes[first], boxes[i]))
        near = [i for i in near if _gap(boxes[first], boxes[i]) <= _NEAR * view.side]
        groups.update(tuple(sorted(near[:count])) for count in range(2, min(len(near), 4) + 1))
    return groups


def _best_trial(view: _View, blob: np.ndarray) -> _Trial | None:
    """Return the shape that fits a blob (h, w) best, or None if the blob is unlike any."""
    rough = [trial for colour in _likely_colours(view.pixels[blob]) for shape in SHAPES
             for trial in _rough_trials(view, blob, shape, colour)]  # fmt: skip
    rough.sort(key=lambda trial: -trial.fit)
    fine: list[_Trial] = []
    for trial in rough[:_REFINED]:
        if trial.fit < rough[0].fit - _MOST_GAIN:
            break
        for _ in range(_STEPS):
            fine.append(trial)
            trial = trial.nudged()
        fine.append(trial)
    if not fine:
        return None
    best = max(fine, key=lambda trial: trial.fit)
    while (trial := best.nudged()).fit > best.fit + _LEAST_GAIN:
        best = trial
    return best


def _rough_trials(view: _View, blob: np.ndarray, shape: str, colour: str) -> list[_Trial]:
    """Return a shape so placed that it has a blob's bounding box, all of it or its visible parts.

    There is none if shape and box differ too much, or the shape would be of no size.
    """
    left, top, right, bottom = _box_of(blob)
    trials: list[_Trial] = []
    for first_x, first_y, last_x, last_y in _extents(shape):
        scale_x, scale_y = (right - left) / (last_x - first_x), (bottom - top) / (last_y - first_y)
        radius = math.sqrt(scale_x * scale_y)
        fits_sizes = [abs(math.log(radius / view.side / size)) for size in SIZE_RADIUS.values()]
        if max(scale_x, scale_y) < _MOST_STRETCH * min(scale_x, scale_y) and (
            min(fits_sizes) < _MOST_SCALE
        ):
            centre = ((left + right) / 2 - radius * (first_x + last_x) / 2,
                      (top + bottom) / 2 - radius * (first_y + last_y) / 2)  # fmt: skip
            trials.append(_Trial(view, blob, shape, colour, radius, centre))
    return trials


@cache
def _extents(shape: str) -> set[tuple[float, ...]]:
    """Return the bounding boxes of what is seen if parts of other shades than its own vanish.

    Each is the least x and y and the largest x and y, in radii from the centre.
    """
    extents = set()
    for seen in (("own",), ("own", "light"), ("own", "dark"), ("own", "light", "dark")):
        corners = np.concatenate([polygon for polygon, shade in parts_of(shape) if shade in seen])
        box = np.concatenate([corners.min(axis=0), corners.max(axis=0)])
        extents.add(tuple(box.round(6).tolist()))
    return extents


def _likely_colours(colours: np.ndarray) -> list[str]:
    """Return the palette's colours to which many of an object's colours (n, 3) are nearest."""
    nearest = _squared(colours[:, None] - _PALETTE).argmin(axis=1)
    shares = np.bincount(nearest, minlength=len(COLOURS)) / len(colours)
    return [name for name, share in zip(COLOURS, shares, strict=True) if share >= _LEAST_SHARE]


def _unknown(view: _View, fragment: np.ndarray) -> SeenObject:
    """Return a fragment (h, w) as an object of no known shape."""
    left, top, right, bottom = _box_of(fragment)
    own = np.median(view.pixels[fragment], axis=0)
    colour = COLOURS[int(_squared(_PALETTE - own).argmin())]
    radius = math.sqrt(fragment.sum() / math.pi)
    return _seen(view, None, colour, radius, ((left + right) / 2, (top + bottom) / 2))


def _seen(view: _View, shape: str | None, colour: str, radius: float,
          centre: tuple[float, float]) -> SeenObject:  # fmt: skip
    """Return an object with its radius and centre in pixels."""
    share = radius / view.side
    size = min(SIZE_RADIUS, key=lambda name: abs(math.log(share / SIZE_RADIUS[name])))
    height, width = view.pixels.shape[:2]
    x, y = (min(max(value, 0.0), 1.0) for value in (centre[0] / width, centre[1] / height))
    return SeenObject(shape, colour, size, x, y)


# Masks


def connected_components(mask: np.ndarray) -> list[np.ndarray]:
    """Split a mask (h, w) into its 4-connected parts, each a mask (h, w), largest first."""
    return _components(mask, 1)


def _components(mask: np.ndarray, least: float) -> list[np.ndarray]:
    """Return the 4-connected parts of a mask (h, w) with at least so many pixels, largest first."""
    # Neighbouring pixels of a row form a run; runs of neighbouring rows that touch are linked.
    change = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(change == 1)
    stops = np.nonzero(change == -1)[1]
    row = mask.shape[1] + 1
    first = np.searchsorted(rows * row + stops, (rows + 1) * row + starts, side="right")
    last = np.searchsorted(rows * row + starts, (rows + 1) * row + stops, side="left")
    parents = list(range(len(rows)))

    def root(run: int) -> int:
        while parents[run] != run:
            parents[run] = run = parents[parents[run]]
        return run

    for run, (low, high) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
        for other in range(low, high):
            parents[root(other)] = root(run)
    roots = np.array([root(run) for run in parents], dtype=np.intp)
    areas = np.bincount(roots, weights=stops - starts, minlength=1)
    labels = np.full(mask.shape, -1)
    labels[mask.astype(bool)] = np.repeat(roots, stops - starts)
    order = np.argsort(-areas, kind="stable")
    return [labels == label for label in order[areas[order] >= max(least, 1)]]


def _without_slivers(mask: np.ndarray, behind: np.ndarray, reach: int) -> np.ndarray:
    """Remove what is at most 2 * reach pixels thick across a sharp edge of the background.

    A horizon or a stripe that is blurred or displaced is no object. A mast that crosses it stays.
    """
    for axis in (0, 1):
        sharp = _sharp(behind, axis)
        if reach and sharp.any():
            thick = _grown(~_grown(~mask, reach, axis), reach, axis)
            mask = mask & (thick | ~_grown(sharp, 2 * reach, axis))
    return mask


def _sharp(behind: np.ndarray, axis: int) -> np.ndarray:
    """Return the pixels of a background (h, w, 3) beside its sharp edges across an axis, (h, w)."""
    sharp = np.zeros(behind.shape[:2], dtype=bool)
    edges = np.moveaxis(_squared(np.diff(behind, axis=axis)) > _EDGE**2, axis, 0)
    beside = np.moveaxis(sharp, axis, 0)
    beside[:-1] |= edges
    beside[1:] |= edges
    return sharp


def _grown(mask: np.ndarray, reach: int, axis: int) -> np.ndarray:
    """Return a mask (h, w) that reaches further on both sides along an axis, by pixels."""
    near = np.moveaxis(mask.copy(), axis, 0)
    source = np.moveaxis(mask, axis, 0)
    for shift in range(1, reach + 1):
        near[shift:] |= source[:-shift]
        near[:-shift] |= source[shift:]
    return np.moveaxis(near, 0, axis)


def _box_of(mask: np.ndarray) -> Box:
    """Return the bounding box of a mask (h, w) that is not empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _gap(first: Box, second: Box) -> int:
    """Return the pixels between two boxes, on the axis on which they are further apart."""
    across = max(first[0], second[0]) - min(first[2], second[2])
    down = max(first[1], second[1]) - min(first[3], second[3])
    return max(across, down, 0)


def _squared(vectors: np.ndarray) -> np.ndarray:
    """Return the squared lengths of vectors (..., 3)."""
    return np.square(vectors) @ np.ones(3, dtype=np.float32)
