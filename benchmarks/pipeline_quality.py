"""Measure speed and quality of each option that changes the image, on the model in the box."""

from __future__ import annotations

import functools
import statistics
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .pipeline_box import draw, held_out, load_box


@dataclass
class Option:
    """One way to generate: arguments of the call, a step cache, a dtype."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    cache: Callable[[Any], Any] | None = None  # makes a configuration for the pipeline
    dtype: str = "float32"


@dataclass
class Drawn:
    """Times and images of an option."""

    seconds: list[float] = field(default_factory=list)  # per image, one value per batch
    pictures: list[Any] = field(default_factory=list)


def measure(args: Namespace) -> dict[str, Any]:
    """Generate every caption with every option, batch by batch in turns, and compare."""
    pipes = {dtype: load_box(dtype) for dtype in ("float32", "bfloat16")}
    options = list_options()
    scenes, captions = held_out(args.captions)
    drawn = {option.name: Drawn() for option in options}
    for pipe in pipes.values():
        draw(pipe, captions[: args.batch_size])  # warm-up, not counted
    for start in range(0, len(captions), args.batch_size):
        batch = captions[start : start + args.batch_size]
        for option in options:
            pictures, taken = draw_with(option, pipes[option.dtype], batch, start)
            drawn[option.name].seconds.append(taken / len(batch))
            drawn[option.name].pictures += pictures
    reference = drawn[options[0].name]
    side = reference.pictures[0].width
    rows = [row(option, drawn[option.name], reference, scenes) for option in options]
    return {
        "columns": ["option", "seconds a picture", "speed-up", "all right", "RMSE, of 255"],
        "rows": rows,
        "notes": [
            f"{args.captions} held-out captions, batches of {args.batch_size} in turn, "
            f"{side} x {side} pixels, guidance scale 2. Speed-up: median over the batches of "
            "default : option. "
            "All right: share of images in which the scene reader finds everything right. RMSE: "
            "mean over the images, to the default's image of the same seed."
        ],
    }


def list_options() -> list[Option]:
    """Return the options, default first, without step caches that this Diffusers lacks."""
    import torch
    from diffusers import hooks

    options = [Option("default: 20 steps")]
    options += [Option(f"{n} steps", {"num_inference_steps": n}) for n in (15, 10, 8, 6, 4)]
    options += [
        Option(f"guidance_interval=({a}, {b})", {"guidance_interval": (a, b)})
        for a, b in ((0.0, 0.5), (0.1, 0.7), (0.2, 0.8))
    ]
    options += [Option("bfloat16", dtype="bfloat16")]
    options += [
        Option(
            f"FirstBlockCache({threshold})",
            cache=functools.partial(_first_block_cache, threshold),
        )
        for threshold in (0.05, 0.1, 0.2, 0.4)
    ]
    caches: dict[str, Callable[[Any], Any]] = {
        "MagCacheConfig": lambda _: hooks.MagCacheConfig(
            mag_ratios=[1.0] * 20, num_inference_steps=20, max_skip_steps=1
        ),
        "TaylorSeerCacheConfig": lambda _: hooks.TaylorSeerCacheConfig(
            cache_interval=3,
            cache_identifiers=[r"transformer_blocks\.\d+"],
            taylor_factors_dtype=torch.float32,
        ),
        "PyramidAttentionBroadcastConfig": lambda pipe: hooks.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            cross_attention_block_skip_range=3,
            current_timestep_callback=lambda: pipe.current_timestep,
        ),
        "FasterCacheConfig": lambda pipe: hooks.FasterCacheConfig(
            tensor_format="BCHW",
            attention_weight_callback=lambda _: 0.3,
            current_timestep_callback=lambda: pipe.current_timestep,
        ),
    }
    return options + [
        Option(name.removesuffix("Config"), cache=cache)
        for name, cache in caches.items()
        if hasattr(hooks, name)
    ]


def _first_block_cache(threshold: float, _: Any) -> Any:
    from diffusers import hooks

    return hooks.FirstBlockCacheConfig(threshold)


def draw_with(option: Option, pipe: Any, captions: list[str], seed: int) -> tuple[Any, float]:
    """Call `draw` with the option's step cache enabled."""
    if option.cache is None:
        return draw(pipe, captions, seed, **option.arguments)
    pipe.transformer.enable_cache(option.cache(pipe))
    try:
        return draw(pipe, captions, seed, **option.arguments)
    finally:
        pipe.transformer.disable_cache()


def row(option: Option, drawn: Drawn, reference: Drawn, scenes: list[Any]) -> list[str]:
    """Return a row of the table."""
    import numpy as np

    from localdit.scenes.score import score_picture

    pairs = zip(reference.seconds, drawn.seconds, strict=True)
    speedup = statistics.median(default / own for default, own in pairs)
    scores = [score_picture(*pair)["all"] for pair in zip(drawn.pictures, scenes, strict=True)]
    errors = [
        np.sqrt(np.mean((np.asarray(own, float) - np.asarray(default, float)) ** 2))
        for own, default in zip(drawn.pictures, reference.pictures, strict=True)
    ]
    return [
        option.name,
        f"{statistics.median(drawn.seconds):.3f}",
        f"{speedup:.2f}",
        f"{100 * statistics.mean(scores):.0f} %",
        f"{np.mean(errors):.1f}",
    ]
