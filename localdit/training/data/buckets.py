"""Aspect-ratio buckets: the sizes that pictures are scaled to, and the bucket of each picture."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from localdit.training.data.samples import Sample

# Stand for the bucket of a picture that is left out.
TOO_SMALL, CUT_TOO_MUCH, HELD_OUT = -1, -2, -3
SHARES = (0.1, 0.25, 0.5, 0.75)  # of a picture, between which reports count
LITTLE = 0.0005  # shown as 0.0 %
WORST = 5  # pictures that reports name


class Size(NamedTuple):
    """Height and width in pixels."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height} x {self.width}"


def bucket_sizes(
    image_size: int, window_size: int, pixels_per_token: int, max_aspect_ratio: float = 2.0
) -> list[Size]:
    """Return the sizes of about `image_size` squared pixels, from tall to wide.

    Sides are multiples of a window if `image_size` is one, so that no window is padded. Otherwise
    they are multiples of a token. Each size has at most as many pixels as the square, and no other
    size of its height has more.

    Args:
        image_size: side of the square, in pixels; a multiple of `pixels_per_token`.
        window_size: side of a window, in tokens.
        pixels_per_token: side of a token, in pixels: pixels per latent times the patch size.
        max_aspect_ratio: largest ratio of the longer side to the shorter.
    """
    tokens = image_size // pixels_per_token
    step = window_size if tokens % window_size == 0 else 1
    sizes = set()
    for short in range(step, tokens + 1, step):
        long = tokens * tokens // short // step * step
        if long / short <= max_aspect_ratio:
            sizes |= {(short, long), (long, short)}
    return [
        Size(height * pixels_per_token, width * pixels_per_token)
        for height, width in sorted(sizes, key=lambda size: size[1] / size[0])
    ]


def crop_sizes(
    crop: str, image_size: int, window_size: int, pixels_per_token: int, max_aspect_ratio: float
) -> list[Size]:
    """Return the sizes of `--crop`: the square alone for "center", otherwise all buckets."""
    if crop == "center":
        return [Size(image_size, image_size)]
    return bucket_sizes(image_size, window_size, pixels_per_token, max_aspect_ratio)


def assign_buckets(
    shapes: Sequence[tuple[int, int]],
    sizes: Sequence[Size],
    max_upscale: float,
    max_crop: float = 1.0,
) -> np.ndarray:
    """Assign each picture to the bucket of the nearest aspect ratio.

    Args:
        shapes: height and width of each picture, in pixels.
        max_upscale: largest factor by which a picture may be enlarged.
        max_crop: largest share of a picture that may be cut away.

    Returns:
        Indices into `sizes`, int64; `TOO_SMALL` or `CUT_TOO_MUCH` for pictures that are left out.
    """
    if not len(shapes):
        return np.empty(0, dtype=np.int64)
    pictures = np.asarray(shapes, dtype=np.float64)  # (N, 2)
    buckets = np.asarray(sizes, dtype=np.float64)  # (S, 2)
    aspects = np.log(pictures[:, 1] / pictures[:, 0])
    wanted = np.log(buckets[:, 1] / buckets[:, 0])
    nearest = np.abs(aspects[:, None] - wanted).argmin(axis=1)
    scale = (buckets[nearest] / pictures).max(axis=1)  # to cover the bucket, as `fit_image` scales
    nearest[cut_away(shapes, sizes, nearest) > max_crop] = CUT_TOO_MUCH
    return np.where(scale > max_upscale, TOO_SMALL, nearest)


def cut_away(
    shapes: Sequence[tuple[int, int]], sizes: Sequence[Size], buckets: np.ndarray
) -> np.ndarray:
    """Return the share of each picture that does not fit its bucket, (N,) from 0 to 1."""
    pictures = np.asarray(shapes, dtype=np.float64).reshape(-1, 2)
    covered = np.asarray(sizes, dtype=np.float64)[buckets] / pictures  # (N, 2) shares of the sides
    return 1 - covered.min(axis=1) / covered.max(axis=1)


def left_out(buckets: np.ndarray) -> str:
    """Return how many pictures are left out for their size: "1 too small, 2 cut too much"."""
    small, cut = int((buckets == TOO_SMALL).sum()), int((buckets == CUT_TOO_MUCH).sum())
    return f"{small:,} too small" + (f", {cut:,} cut too much" if cut else "")


def describe_crops(samples: Sequence[Sample], sizes: Sequence[Size], buckets: np.ndarray) -> str:
    """Describe in three lines how much of pictures is cut away to fit their buckets; "" if none."""
    used = np.flatnonzero(buckets >= 0).tolist()
    shapes = [(samples[index].height, samples[index].width) for index in used]
    cut = cut_away(shapes, sizes, buckets[used])
    if not len(cut) or cut.max() < LITTLE:
        return ""
    edges = (0.0, *SHARES, 1.0)
    counts, _ = np.histogram(cut, edges)
    ranges = [f"{low:.0%} to {high:.0%}" for low, high in pairwise(edges)]
    worst = np.argsort(-cut, kind="stable")[:WORST].tolist()
    named = [
        f"{samples[used[at]].id} ({Size(*shapes[at])}: {cut[at]:.1%})"
        for at in worst
        if cut[at] >= LITTLE
    ]
    return (
        f"Cut away to fit the buckets: {cut.mean():.1%} of a picture on average, at most "
        f"{cut.max():.1%}; --max-crop leaves out those that lose more\n  pictures by share: "
        + ", ".join(f"{count:,} lose {part}" for part, count in zip(ranges, counts, strict=True))
        + f"\n  most: {', '.join(named)}"
    )
