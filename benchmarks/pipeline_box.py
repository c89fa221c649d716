"""Load the model in the box, and generate images for held-out captions."""

from __future__ import annotations

import time
from typing import Any

GUIDANCE = 2.0


def load_box(dtype: str = "float32") -> Any:
    """Load the pipeline in the box, without progress bars."""
    import torch

    from localdit.pipelines import LocalDiTPipeline
    from localdit.utils import model_in_the_box

    pipe = LocalDiTPipeline.from_pretrained(model_in_the_box()).to(getattr(torch, dtype))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def held_out(count: int, seed: int = 0) -> tuple[list[Any], list[str]]:
    """Return scenes with combinations that training never showed, and their captions."""
    import numpy as np

    from localdit.scenes import describe, sample_scenes

    scenes = list(sample_scenes(count, seed + 1_000_003, True))
    rng = np.random.default_rng([seed, 11])
    return scenes, [describe(scene, rng).text for scene in scenes]


def draw(
    pipe: Any, captions: list[str], first_seed: int = 0, **arguments: Any
) -> tuple[Any, float]:
    """Generate images for captions, one seed each; return them and the seconds taken."""
    import torch

    generators = [torch.Generator().manual_seed(first_seed + i) for i in range(len(captions))]
    arguments = {"guidance_scale": GUIDANCE, **arguments}
    start = time.perf_counter()
    pictures = pipe(captions, generator=generators, **arguments).images
    return pictures, time.perf_counter() - start
