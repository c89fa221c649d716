"""Unfinished pictures: what the denoiser expects the picture to become, decoded small."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from ..pipelines.base import LocalDiTBasePipeline


class Previews:
    """Makes previews of one drawing, as many as a share of its time allows.

    A preview is made when the drawing has gone on for at least `work_per_preview` times as long as
    the latest one took, so that slow autoencoders give fewer of them, not slower drawings.
    """

    def __init__(self, work_per_preview: float = 2.0) -> None:
        self._work_per_preview = work_per_preview
        self._next = 0.0  # on the clock of `time.monotonic`

    def of(self, pipe: LocalDiTBasePipeline, latents: torch.Tensor) -> Image.Image | None:
        """A preview of the first picture of a batch, or None where it isn't time for one.

        Args:
            pipe: as its step callback gets it.
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
    """The latents without noise that the latest step aimed at, `(B, C, H, W)`.

    DPM-Solver++ and UniPC keep these estimates for their next step. With other schedulers, the
    latents themselves, noise and all.
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
    """Whether decoding between two steps would move models between CPU and GPU."""
    return hasattr(pipe.vae, "_hf_hook")
