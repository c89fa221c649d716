"""Measure every stage from a prompt to a PNG file with full-size models, in separate processes."""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .peak_memory import peak_bytes, reset_peak
from .pipeline_large import CAPTION
from .pipeline_parts import SDXL_VAE, T5_LAYERS, T5_XXL, seconds
from .tables import gibibytes
from .worker import ROOT, in_own_process

STARTS = 3  # of the model in the box
IMPORT = re.compile(r"import time:\s*(\d+) \|\s*\d+ \|\s*localdit\b")


@dataclass(frozen=True)
class Setup:
    """A way to a picture.

    Attributes:
        preset: shape of the denoiser, a key of `localdit.models.PRESETS`.
        steps, guidance_scale: of the sampler; a guided step takes two passes.
        autoencoder: class of Diffusers.
        arguments: of the autoencoder; the others are its defaults.
    """

    preset: str
    steps: int
    guidance_scale: float
    autoencoder: str
    arguments: dict[str, Any]

    @property
    def passes(self) -> int:
        """Passes of the denoiser for a picture."""
        return self.steps * (2 if self.guidance_scale > 1 else 1)


BLOCKS = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
SANA_VAE = {  # dc-ae-f32c32-sana-1.0, besides the defaults of `AutoencoderDC`
    "encoder_block_types": BLOCKS,
    "decoder_block_types": BLOCKS,
    "upsample_block_type": "interpolate",
    "downsample_block_type": "Conv",
    "scaling_factor": 0.41407,
}
SMALL_VAE = {  # the layers of `AutoencoderTiny`, with two more levels: 32 pixels per latent
    "latent_channels": 32,
    "encoder_block_out_channels": (64,) * 6,
    "decoder_block_out_channels": (64,) * 6,
    "num_encoder_blocks": (1, 3, 3, 3, 3, 3),
    "num_decoder_blocks": (3, 3, 3, 3, 3, 1),
}
SETUPS = {
    "as released": Setup("released", 20, 4.5, "AutoencoderKL", SDXL_VAE),
    "few steps": Setup("released", 4, 1.0, "AutoencoderTiny", {}),
    "few steps, compact latents": Setup("released-f32", 4, 1.0, "AutoencoderDC", SANA_VAE),
    "few steps, compact latents, small decoder": Setup(
        "released-f32", 4, 1.0, "AutoencoderTiny", SMALL_VAE
    ),
}


def measure(args: Namespace) -> dict[str, Any]:
    """Return a row per setup with the seconds of its stages, and what the model in the box takes.

    `args.num_inference_steps` steps are run, by default those that take four passes, and scaled to
    those of the setup.
    """
    pixels = args.pixels or 1024
    args.output.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, setup in SETUPS.items():
        found[name] = in_own_process(
            "pipeline_whole:draw_whole", setup_name=name, pixels=pixels, dtype=args.dtype,
            steps=min(args.num_inference_steps or setup.steps * 4 // setup.passes, setup.steps),
            text_layers=args.text_layers, path=str((args.output / "whole.png").resolve()),
        )  # fmt: skip
    box = first_picture(args.output)
    stages = ("text", "denoising", "decoding", "saving")
    rows = [
        [
            name, setup.passes, setup.autoencoder,
            *(f"{found[name][stage]:.1f}" for stage in stages),
            f"{sum(found[name][stage] for stage in stages):.1f}", gibibytes(found[name]["peak"]),
        ]
        for name, setup in SETUPS.items()
    ]  # fmt: skip
    first = next(iter(found.values()))
    how = [
        f'Time of the denoiser in the setup "{name}": scaled from {one["steps"]} of '
        f"{SETUPS[name].steps} steps."
        for name, one in found.items()
        if one["steps"] < SETUPS[name].steps
    ]
    if args.text_layers < T5_LAYERS:
        how.append(
            f"Time of the text encoder: scaled from {args.text_layers} of {T5_LAYERS} layers."
        )
    return {
        "columns": [
            "setup", "passes", "autoencoder", "text encoder, s", "denoiser, s", "decoding, s",
            "PNG, s", "total, s", "peak after the text encoder, GiB",
        ],
        "rows": rows,
        "notes": [
            f"One image of {pixels} x {pixels} pixels in {args.dtype}. The weights are random and "
            f"not loaded from a file. The prompt has {first['tokens']} tokens; a prompt that is "
            "already encoded takes no time. The text encoder has the shape of FLAN-T5-XXL and is "
            f"released before the first step. {' '.join(how) or 'All steps and layers were run.'}",
            "",
            "With the student in the box, `localdit generate` saved its first image after "
            f"{box['seconds']:.1f} s (median of {STARTS} starts). The import of LocalDiT's own "
            f"modules took {box['own_imports']:.2f} s of this (`-X importtime`).",
        ],
        "measured": found | {"box": box},
    }  # fmt: skip


def draw_whole(
    setup_name: str, pixels: int, dtype: str, steps: int, text_layers: int, path: str
) -> dict[str, Any]:
    """Generate and save one image with full-size models.

    Returns:
        The seconds of "text", "denoising", "decoding" and "saving", with the first two scaled to
        all layers and steps; "peak", the bytes of the process after the text encoder was released;
        "tokens" of the prompt and the "steps" that were run.
    """
    import diffusers
    import torch
    from transformers import AutoTokenizer, T5Config, T5EncoderModel

    from localdit.core.diffusion import Objective
    from localdit.machine import with_random_weights
    from localdit.models import PRESETS, LocalDiTTransformer2DModel
    from localdit.pipelines import LocalDiTPipeline
    from localdit.utils import model_in_the_box

    setup, number = SETUPS[setup_name], getattr(torch, dtype)

    def made(build: Any) -> Any:
        return with_random_weights(build, number, "cpu").eval()

    text = T5Config(num_layers=text_layers, **T5_XXL)
    few = setup.guidance_scale == 1
    scheduler = (
        Objective("epsilon").few_step_scheduler(8)
        if few
        else diffusers.DPMSolverMultistepScheduler()
    )
    pipe: Any = LocalDiTPipeline(
        AutoTokenizer.from_pretrained(Path(model_in_the_box()) / "tokenizer"),
        made(lambda: T5EncoderModel(text)),
        made(lambda: getattr(diffusers, setup.autoencoder)(**setup.arguments)),
        made(lambda: LocalDiTTransformer2DModel(**PRESETS[setup.preset])),
        scheduler,
        steps,
        setup.guidance_scale,
    )
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        encoding = seconds(lambda: pipe.encode_prompt(CAPTION, setup.guidance_scale > 1))
    pipe.release_text_encoder()
    reset_peak()
    times: list[float] = []

    def note(*_: Any) -> dict[str, Any]:
        times.append(time.perf_counter())
        return {}

    pipe.transformer.register_forward_pre_hook(lambda *_: times.append(time.perf_counter()))
    image = pipe(
        CAPTION, height=pixels, width=pixels, generator=torch.Generator().manual_seed(0),
        callback_on_step_end=note,
    ).images[0]  # fmt: skip
    end = time.perf_counter()
    saving = seconds(lambda: image.save(path))
    return {
        "text": encoding * T5_LAYERS / text_layers,
        "denoising": (times[-1] - times[0]) * setup.steps / steps,
        "decoding": end - times[-1],
        "saving": saving,
        "peak": peak_bytes(),
        "tokens": pipe.text_space.count_tokens([CAPTION], 120)[0],
        "steps": steps,
    }


def first_picture(folder: Path) -> dict[str, float]:
    """Start `localdit generate` with the student in the box several times.

    Returns:
        The median "seconds" until it has saved its picture and ended, and the seconds of
        "own_imports", which do not include those of other packages.
    """
    options = ["--model", "box-few-steps", "-o", str(folder)]
    generate = ["-m", "localdit", "generate", CAPTION, *options]

    def start(*options: str) -> str:
        command = [sys.executable, *options, *generate]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stderr

    taken = statistics.median(seconds(start) for _ in range(STARTS))
    own = sum(int(found[1]) for found in IMPORT.finditer(start("-X", "importtime")))
    return {"seconds": taken, "own_imports": own / 1e6}
