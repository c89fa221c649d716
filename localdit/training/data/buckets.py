"""Aspect-ratio buckets: the sizes that pictures are brought to, and which picture goes where."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

PIXEL_MULTIPLE = 16  # 8 pixels per latent, 2 latents per token


class Size(NamedTuple):
    """Height and width in pixels."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height} x {self.width}"


def bucket_sizes(image_size: int, window_size: int, max_aspect_ratio: float = 2.0) -> list[Size]:
    """The sizes of about `image_size` squared pixels, from tall to wide.

    Sides are multiples of a window where `image_size` is, so that no window is padded; of a token
    (`PIXEL_MULTIPLE` pixels) where it is not. Each size has at most as many pixels as the square,
    and no other of its height has more.

    Args:
        image_size: side of the square, in pixels.
        window_size: side of a window, in tokens.
        max_aspect_ratio: longer side over shorter, at most.
    """
    tokens = image_size // PIXEL_MULTIPLE
    step = window_size if tokens % window_size == 0 else 1
    sizes = set()
    for short in range(step, tokens + 1, step):
        long = tokens * tokens // short // step * step
        if long / short <= max_aspect_ratio:
            sizes |= {(short, long), (long, short)}
    return [
        Size(height * PIXEL_MULTIPLE, width * PIXEL_MULTIPLE)
        for height, width in sorted(sizes, key=lambda size: size[1] / size[0])
    ]


def assign_buckets(
    shapes: Sequence[tuple[int, int]], sizes: Sequence[Size], max_upscale: float
) -> np.ndarray:
    """Which bucket each picture goes into: that of the nearest aspect ratio.

    Args:
        shapes: height and width of each picture, in pixels.
        sizes: the buckets.
        max_upscale: the largest factor a picture may be enlarged by.

    Returns:
        Indices into `sizes`, int64; -1 for pictures too small for their bucket.
    """
    if not len(shapes):
        return np.empty(0, dtype=np.int64)
    pictures = np.asarray(shapes, dtype=np.float64)  # (N, 2)
    buckets = np.asarray(sizes, dtype=np.float64)  # (S, 2)
    aspects = np.log(pictures[:, 1] / pictures[:, 0])
    wanted = np.log(buckets[:, 1] / buckets[:, 0])
    nearest = np.abs(aspects[:, None] - wanted).argmin(axis=1)
    scale = (buckets[nearest] / pictures).max(axis=1)  # as `fit_image` scales: to cover
    return np.where(scale > max_upscale, -1, nearest)
