"""Aspect-ratio buckets: the sizes that pictures are scaled to, and the bucket of each picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


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
    shapes: Sequence[tuple[int, int]], sizes: Sequence[Size], max_upscale: float
) -> np.ndarray:
    """Assign each picture to the bucket of the nearest aspect ratio.

    Args:
        shapes: height and width of each picture, in pixels.
        sizes: the buckets.
        max_upscale: largest factor by which a picture may be enlarged.

    Returns:
        Indices into `sizes`, int64; -1 for pictures that are too small for their bucket.
    """
    if not len(shapes):
        return np.empty(0, dtype=np.int64)
    pictures = np.asarray(shapes, dtype=np.float64)  # (N, 2)
    buckets = np.asarray(sizes, dtype=np.float64)  # (S, 2)
    aspects = np.log(pictures[:, 1] / pictures[:, 0])
    wanted = np.log(buckets[:, 1] / buckets[:, 0])
    nearest = np.abs(aspects[:, None] - wanted).argmin(axis=1)
    scale = (buckets[nearest] / pictures).max(axis=1)  # to cover the bucket, as `fit_image` scales
    return np.where(scale > max_upscale, -1, nearest)
