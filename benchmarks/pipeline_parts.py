"""Measure time and memory of each full-size part of a pipeline, in separate processes."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from .peak_memory import peak_bytes, resident_bytes
from .tables import gibibytes
from .worker import in_own_process

T5_LAYERS, STEPS, TOKENS = 24, 20, 120
T5_XXL = {
    "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_heads": 64,
    "feed_forward_proj": "gated-gelu", "dropout_rate": 0.0,
}  # fmt: skip
SDXL_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
}


def measure(args: Namespace) -> dict[str, Any]:
    """Return a row per part, and the memory freed by releasing the text encoder."""
    pixels, steps = args.pixels or 1024, args.num_inference_steps or 1
    dtype = args.dtype
    text = in_own_process("pipeline_parts:encode_text", dtype=dtype)
    denoiser = in_own_process("pipeline_parts:denoise", dtype=dtype, pixels=pixels, steps=steps)
    decoder = {
        tile: in_own_process("pipeline_parts:decode", dtype=dtype, pixels=pixels, tile=tile)
        for tile in (None, args.tile)
    }
    tile = 8 * args.tile
    cells = [
        ("text encoder, 2 prompts", f"1 of {T5_LAYERS} layers, times {T5_LAYERS}", text),
        (f"denoiser, {STEPS} guided steps", f"{steps} of {STEPS} steps, scaled", denoiser),
        ("autoencoder, at once", "measured whole", decoder[None]),
        (f"autoencoder, {tile}-pixel tiles", "measured whole", decoder[args.tile]),
    ]
    rows = [
        [name, how, f"{part['seconds']:.1f}", gibibytes(part["weights"]), gibibytes(part["peak"])]
        for name, how, part in cells
    ]
    given_back, dropped = text["given_back"], text["dropped"]
    return {
        "columns": ["part", "how", "seconds", "weights, GiB", "peak of the process, GiB"],
        "rows": rows,
        "notes": [
            f"An image of {pixels} x {pixels} pixels in {args.dtype}, {TOKENS} text tokens, "
            "models with random weights. The weights of the text encoder are those of all layers; "
            "its peak is that of a process with one layer. `release_text_encoder()` returned "
            f"{gibibytes(given_back)} GiB to the system, {given_back / dropped:.0%} of the "
            f"{gibibytes(dropped)} GiB of this layer."
        ],
        "measured": {name: part for name, _, part in cells},
    }


def seconds(call: Callable[[], Any]) -> float:
    """Return the seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def encode_text(dtype: str) -> dict[str, Any]:
    """Measure a one-layer text encoder: time scaled to all layers, and memory on release."""
    import torch
    from transformers import T5Config, T5EncoderModel

    from localdit.pipelines import LocalDiTPipeline

    with torch.device("meta"):
        whole = T5EncoderModel(T5Config(num_layers=T5_LAYERS, **T5_XXL))
    width = getattr(torch, dtype).itemsize
    weights = width * sum(p.numel() for p in whole.parameters())
    encoder = random_weights(lambda: T5EncoderModel(T5Config(num_layers=1, **T5_XXL)), dtype)
    size = sum(p.nbytes for p in encoder.parameters())
    nothing: Any = None
    pipe: Any = LocalDiTPipeline(nothing, encoder, nothing, nothing, nothing)
    ids = torch.randint(2, 1000, (1, TOKENS))
    del encoder  # now only the pipeline holds it
    with torch.no_grad():
        pipe.text_encoder(ids)  # warm-up, not counted
        layer = min(seconds(lambda: pipe.text_encoder(ids)) for _ in range(3))
    before = resident_bytes()
    pipe.release_text_encoder()
    return {
        "seconds": 2 * T5_LAYERS * layer,
        "weights": weights,
        "dropped": size,
        "given_back": before - resident_bytes(),
        "peak": peak_bytes(),
    }


def denoise(dtype: str, pixels: int, steps: int) -> dict[str, Any]:
    """Time `steps` guided steps of the denoiser, scaled to all steps."""
    import torch

    from localdit.models import LocalDiTTransformer2DModel

    model = random_weights(LocalDiTTransformer2DModel, dtype)
    number = getattr(torch, dtype)
    arguments = {
        "encoder_hidden_states": torch.randn(2, TOKENS, 4096, dtype=number),
        "encoder_attention_mask": torch.ones(2, TOKENS),
        "timestep": torch.tensor([500]),
        "added_cond_kwargs": {
            "resolution": torch.full((2, 2), float(pixels)),
            "aspect_ratio": torch.ones(2, 1),
        },
    }
    latents = torch.randn(2, 4, pixels // 8, pixels // 8, dtype=number)
    with torch.no_grad():
        model(latents[..., :32, :32], **arguments)  # warm-up, not counted
        taken = [seconds(lambda: model(latents, **arguments)) for _ in range(steps)]
    weights = sum(p.nbytes for p in model.parameters())
    return {
        "seconds": STEPS * sum(taken) / steps,
        "taken": taken,
        "weights": weights,
        "peak": peak_bytes(),
    }


def decode(dtype: str, pixels: int, tile: int | None) -> dict[str, Any]:
    """Decode one image with an autoencoder of SDXL's shape, at once or in tiles."""
    import torch
    from diffusers import AutoencoderKL

    from localdit.core.tiling import CROP, in_tiles

    vae = random_weights(lambda: AutoencoderKL(**SDXL_VAE), dtype)
    vae.encoder = None
    latents = torch.randn(1, 4, pixels // 8, pixels // 8, dtype=getattr(torch, dtype))

    def run(z: torch.Tensor) -> torch.Tensor:
        return vae.decode(z, return_dict=False)[0]

    with torch.no_grad():
        run(latents[..., :8, :8])  # warm-up, not counted
        if tile is None:
            taken = seconds(lambda: run(latents))
        else:
            vae.enable_tiling()
            vae.tile_latent_min_size, vae.tile_sample_min_size = tile, 8 * tile
            taken = seconds(lambda: in_tiles(vae, run, latents, CROP))
    weights = sum(p.nbytes for p in vae.parameters())
    return {"seconds": taken, "weights": weights, "peak": peak_bytes()}


def random_weights(build: Callable[[], Any], dtype: str) -> Any:
    """Return a model with small random weights, created in its dtype."""
    import torch

    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        return build().eval()
    finally:
        torch.set_default_dtype(before)
