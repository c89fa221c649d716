"""Previews of unfinished pictures: the denoiser's current estimate, decoded at a small size."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from ..pipelines.base import LocalDiTBasePipeline


class Previews:
    """Makes the previews of one drawing within a share of its time.

    After a preview, the drawing goes on for at least `work_per_preview` times as long as the
    preview took. A slow autoencoder thus makes fewer previews, not a slower drawing.
    """

    def __init__(self, work_per_preview: float = 2.0) -> None:
        self._work_per_preview = work_per_preview
        self._next = 0.0  # on the clock of `time.monotonic`

    def of(self, pipe: LocalDiTBasePipeline, latents: torch.Tensor) -> Image.Image | None:
        """Return a preview of the first picture of a batch, or None if it is too early for one.

        Args:
            pipe: the pipeline that calls the step callback.
            latents: the latents after the step, `(B, C, H, W)`.
        """
        start = time.monotonic()
        if start < self._next or _is_offloaded(pipe):
            return None
        picture = decode_small(pipe, expected_latents(pipe.scheduler, latents)[:1])
        end = time.monotonic()
        self._next = end + self._work_per_preview * (end - start)
        return picture


def expected_latents(scheduler: Any, latents: torch.Tensor) -> torch.Tensor:
    """Return the latest step's estimate of the latents without noise, `(B, C, H, W)`.

    DPM-Solver++ and UniPC keep this estimate for their next step. With other schedulers, the noisy
    latents themselves are returned.
    """
    config = scheduler.config
    solves_for_them = "++" in config.get("algorithm_type", "") or config.get("predict_x0", False)
    kept = getattr(scheduler, "model_outputs", None)
    return kept[-1] if solves_for_them and kept and kept[-1] is not None else latents


def decode_small(pipe: LocalDiTBasePipeline, latents: torch.Tensor) -> Image.Image:
    """Decode latents `(1, C, H, W)` into a small picture; see `LatentSpace.decode_preview`."""
    import torch

    with torch.no_grad():
        decoded = pipe.latent_space.decode_preview(latents)
    return pipe.image_processor.postprocess(decoded, output_type="pil")[0]


def _is_offloaded(pipe: LocalDiTBasePipeline) -> bool:
    """Return whether decoding between two steps would move models between CPU and GPU."""
    return hasattr(pipe.vae, "_hf_hook")
