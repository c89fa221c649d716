"""Conditions beside text: the size of the picture, as PixArt-alpha's "micro-conditions"."""

from __future__ import annotations

import torch


def size_conditions(
    conditioned: bool, height: int, width: int, device: torch.device
) -> dict[str, torch.Tensor | None]:
    """Return the denoiser's `added_cond_kwargs` for pictures of a size.

    There is one row for the whole batch, since some step caches leave half of a batch out. Values
    are float32 whatever the latents are: the embedding computes in float32, and bfloat16 would
    round.

    Args:
        conditioned: whether the denoiser is conditioned on sizes (its
            `use_additional_conditions`); otherwise the values are None.
        height, width: of the pictures, in pixels.

    Returns:
        "resolution" `(1, 2)`, height and width in pixels, and "aspect_ratio" `(1, 1)`,
        width / height.
    """
    if not conditioned:
        return {"resolution": None, "aspect_ratio": None}
    return {
        "resolution": torch.tensor([[height, width]], dtype=torch.float32, device=device),
        "aspect_ratio": torch.tensor([[width / height]], dtype=torch.float32, device=device),
    }
