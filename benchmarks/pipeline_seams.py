"""Compare decoding in tiles with decoding at once: errors, and visibility of seams."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

# With group norms and 8 pixels per latent.
TRAINED = Path(__file__).parents[1] / "tests/data/autoencoder"
STRIP = 0.4  # share of the image's height that is sky, above ground that changes across


def measure(args: Namespace) -> dict[str, Any]:
    """Compare on an autoencoder that was trained on scenes, and on one of SDXL's shape.

    The one in the box has no group norms, whose statistics are what tiles differ in.
    """
    import torch
    from diffusers import AutoencoderKL

    from .pipeline_parts import SDXL_VAE, random_weights

    pixels = args.pixels or 1536
    trained = AutoencoderKL.from_pretrained(TRAINED).eval()
    sdxl = random_weights(lambda: AutoencoderKL(**SDXL_VAE), "float32")
    cases = [
        ("trained on scenes", trained, scene(pixels), 128, 0.25),
        ("trained on scenes", trained, landscape(pixels), 128, 0.25),
        ("SDXL's shape, untrained", sdxl, landscape(pixels // 2), 64, 0.25),
    ]
    rows = []
    with torch.no_grad():
        for name, vae, (content, picture), tile, overlap in cases:
            vae.tile_latent_min_size, vae.tile_sample_min_size = tile, 8 * tile
            vae.tile_overlap_factor = overlap
            label = f"{name}: {content}, {picture.shape[-1]} pixels, tiles of {8 * tile}"
            rows += compare(label, vae, picture)
    return {
        "columns": [
            "autoencoder and picture", "decoded", "seconds", "largest error", "mean error",
            "near borders", "elsewhere", "drift of the sky",
        ],
        "rows": rows,
        "notes": [
            "Errors compared with decoding at once, in 255ths of the range of its values. Near "
            "borders: where two tiles blend, along the width. Drift: the largest difference, "
            f"between columns, in the mean error of the upper {100 * STRIP:.0f} % of their pixels, "
            "which is what a seam in an even sky looks like."
        ],
    }  # fmt: skip


def compare(label: str, vae: Any, picture: Any) -> list[list[str]]:
    """Return three rows: at once, Diffusers' tiles, tiles with shared statistics."""
    from localdit.core.tiling import CROP, in_tiles

    latents = vae.encode(picture).latent_dist.mode()

    def run(z: Any) -> Any:
        return vae.decode(z, return_dict=False)[0]

    reference, taken = timed(lambda: run(latents))
    rows = [[label, "at once", f"{taken:.1f}", *["-"] * 5]]
    ways = {
        "Diffusers' tiles": lambda: run(latents),
        "ours: shared statistics": lambda: in_tiles(vae, run, latents, CROP),
    }
    vae.enable_tiling()
    for way, decode in ways.items():
        decoded, taken = timed(decode)
        rows.append([label, way, f"{taken:.1f}", *errors(decoded, reference, vae)])
    vae.disable_tiling()
    return rows


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """Return a call's result and its seconds."""
    start = time.perf_counter()
    return call(), time.perf_counter() - start


def errors(decoded: Any, reference: Any, vae: Any) -> list[str]:
    """Return cells: largest and mean error, near borders and elsewhere, and drift."""
    import torch

    error = (decoded - reference)[0] / (reference.max() - reference.min()) * 255
    width, tile = error.shape[2], vae.tile_sample_min_size
    fade = int(tile * vae.tile_overlap_factor)
    near = torch.zeros(width, dtype=torch.bool)
    for start in range(tile - fade, width, tile - fade):
        near[start : start + fade] = True
    columns = error.abs().mean((0, 1))
    sky = error[:, 8 : int(STRIP * error.shape[1])].mean(1)  # (3, width)
    drift = (sky.amax(1) - sky.amin(1)).max()
    values = (error.abs().max(), columns.mean(), columns[near].mean(), columns[~near].mean(), drift)
    return [f"{float(value):.2f}" for value in values]


def landscape(pixels: int) -> tuple[str, Any]:
    """Return a smooth sky with rough ground under its right half."""
    import numpy as np
    import torch

    y, x = np.mgrid[0:pixels, 0:pixels] / pixels
    sky = np.stack([0.5 + 0.3 * np.sin(2 * x + 2 * y), 0.2 + 0.6 * y, 0.3 + 0.4 * x * y])
    ground = 0.4 * sky + 0.5 * np.random.default_rng(0).random((1, pixels, pixels))
    picture = np.where((y > 0.5) & (x > 0.5), ground, sky)
    return "sky over ground", torch.from_numpy(picture).float()[None] * 2 - 1


def scene(pixels: int) -> tuple[str, Any]:
    """Return a drawn scene."""
    import numpy as np
    import torch

    from localdit.scenes import draw_scene, sample_scenes

    drawn = np.array(draw_scene(next(iter(sample_scenes(1, 0, False))), pixels))
    return "drawn scene", torch.from_numpy(drawn).permute(2, 0, 1)[None] / 127.5 - 1
