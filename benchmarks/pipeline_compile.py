"""Measure compile time and run time of compiled blocks, on the model in the box."""

from __future__ import annotations

import statistics
from argparse import Namespace
from typing import Any

from .pipeline_box import draw, held_out, load_box


def measure(args: Namespace) -> dict[str, Any]:
    """Time a pipeline without and with compiled blocks, in turns."""
    import numpy as np

    _, captions = held_out(args.batch_size)
    plain, compiled = load_box(), load_box()
    expected, first_plain = draw(plain, captions, output_type="np")
    compiled.transformer.compile_repeated_blocks()
    result, first = draw(compiled, captions, output_type="np")
    side = result.shape[1]
    pairs = [(draw(plain, captions)[1], draw(compiled, captions)[1]) for _ in range(args.repeats)]
    eager, run = (statistics.median(times) for times in zip(*pairs, strict=True))
    speedup = statistics.median(one / other for one, other in pairs)
    return {
        "columns": ["", "first call, s", "later calls, s", "speed-up"],
        "rows": [
            ["not compiled", f"{first_plain:.1f}", f"{eager:.2f}", "1.00"],
            ["compiled blocks", f"{first:.1f}", f"{run:.2f}", f"{speedup:.2f}"],
        ],
        "notes": [
            f"A call generates {args.batch_size} images of {side} x {side} pixels in 20 guided "
            "steps. The compiled and the other pipeline run in turn; times are medians of "
            f"{args.repeats} calls. Compiling took {first - run:.1f} s: the first call minus a "
            "later one. Largest difference between their pixels, in [0, 1]: "
            f"{np.abs(result - expected).max():.1e}."
        ],
    }
