"""Generate an image far larger than the training size, in bounded memory."""

from __future__ import annotations

import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from .tables import gibibytes
from .worker import in_own_process

CAPTION = "a large red circle at the top left on a blue background"


def measure(args: Namespace) -> dict[str, Any]:
    """Generate and save the image in a separate process; return time and memory."""
    pixels, steps = args.pixels or 4096, args.num_inference_steps or 4
    args.output.mkdir(parents=True, exist_ok=True)
    path = (args.output / f"large_{pixels}.png").resolve()
    result = in_own_process("pipeline_large:draw_large", pixels=pixels, steps=steps, path=str(path))
    return {
        "columns": ["pixels", "steps", "denoising, s", "decoding, s", "imports and weights, GiB",
                    "peak, GiB"],
        "rows": [[
            f"{pixels} x {pixels}", steps, f"{result['denoising']:.0f}",
            f"{result['decoding']:.0f}", gibibytes(result["before"]), gibibytes(result["peak"]),
        ]],
        "notes": [f"The model in the box in float32, guidance scale 2. The image: {path.name}."],
    }  # fmt: skip


def draw_large(pixels: int, steps: int, path: str) -> dict[str, Any]:
    """Generate and save one large image and a small copy; return time and memory."""
    import torch

    from .peak_memory import peak_bytes
    from .pipeline_box import GUIDANCE, load_box

    pipe = load_box()
    before, start = peak_bytes(), time.perf_counter()
    ends: list[float] = []

    def note(pipeline: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        ends.append(time.perf_counter())
        return {}

    picture = pipe(
        CAPTION, height=pixels, width=pixels, num_inference_steps=steps, guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(0), callback_on_step_end=note,
    ).images[0]  # fmt: skip
    end = time.perf_counter()
    picture.save(path)
    picture.resize((512, 512)).save(Path(path).with_suffix(".small.png"))
    return {"denoising": ends[-1] - start, "decoding": end - ends[-1], "before": before,
            "peak": peak_bytes()}  # fmt: skip
