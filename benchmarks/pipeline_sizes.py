"""Measure how memory grows over images of many sizes, with small and with large oneDNN caches."""

from __future__ import annotations

import os
import random
from argparse import Namespace
from typing import Any

from .peak_memory import give_back_unused, resident_bytes
from .worker import in_own_process

SIZES, SMALLEST, LARGEST, MULTIPLE = 150, 64, 768, 32
CAPTION = "a large red circle at the top left on a blue background"
LARGE_CACHES = 1024  # primitives, PyTorch's own setting


def measure(args: Namespace) -> dict[str, Any]:
    """Return the memory before and after two rounds of images, for each setting of the caches."""
    rows, measured = [], {}
    for name, capacity in (("LocalDiT", None), ("PyTorch", LARGE_CACHES)):
        before, *after = in_own_process("pipeline_sizes:draw_sizes", capacity=capacity)
        rows.append([name, f"{before / 2**20:.0f}"])
        rows[-1] += [f"{size / 2**20:.0f} ({size / before - 1:+.1%})" for size in after]
        measured[name] = [before, *after]
    return {
        "columns": ["caches as set by", "before, MiB", "after round 1, MiB", "after round 2, MiB"],
        "rows": rows,
        "notes": [
            f"The model in the box generates images of {SIZES} sizes between {SMALLEST} and "
            f"{LARGEST} pixels a side, with one unguided step each, in float32. The table shows "
            "the resident memory of the process, after unused memory was returned to the system. "
            "Before: after one image of the largest size."
        ],
        "measured": measured,
    }


def draw_sizes(capacity: int | None, count: int = SIZES) -> list[int]:
    """Draw images of many sizes twice; return the resident bytes before and after each round.

    Args:
        capacity: primitives in each of the caches; None for LocalDiT's setting.
        count: number of sizes.
    """
    if capacity is not None:
        for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
            os.environ[name] = str(capacity)
    from .pipeline_box import load_box

    pipe, rng = load_box(), random.Random(0)
    sides = range(SMALLEST, LARGEST + 1, MULTIPLE)
    sizes = rng.sample([(height, width) for height in sides for width in sides], count)

    def draw(height: int, width: int) -> None:
        pipe(CAPTION, height=height, width=width, num_inference_steps=1, guidance_scale=1.0)

    def resident() -> int:
        give_back_unused()
        return resident_bytes()

    draw(LARGEST, LARGEST)
    found = [resident()]
    for _ in range(2):
        for size in sizes:
            draw(*size)
        found.append(resident())
    return found
