"""What schedulers of different families call differently, or lack."""

from __future__ import annotations

from typing import Any

import torch


def check_schedule(scheduler: Any) -> None:
    """Raise `ValueError` for a schedule that a pipeline cannot follow from noise to picture.

    Timesteps must not ascend, and must exist: those of a scheduler that counts in whole ones are at
    least 0. A solver of order 1 that goes by noise levels divides by their differences, which must
    not be 0; neighbouring timesteps that are the same after rounding do no harm to it.
    """
    timesteps, sigmas = scheduler.timesteps, getattr(scheduler, "sigmas", None)
    sound = len(timesteps) > 0 and bool((timesteps.diff() <= 0).all())
    if sound and not timesteps.is_floating_point():
        sound = bool(timesteps[-1] >= 0)
    if sound and sigmas is not None and scheduler.order == 1:
        sound = bool((sigmas[: len(timesteps)].diff() < 0).all())
    if not sound:
        raise ValueError(
            f"The {len(timesteps)} timesteps must each be lower than the one before, and at least "
            "0: take fewer steps, or correct the timesteps or sigmas given."
        )


def initial_scale(scheduler: Any) -> Any:
    """The standard deviation of the noise that sampling starts from; 1 for flow matching."""
    return getattr(scheduler, "init_noise_sigma", 1.0)


def scale_input(scheduler: Any, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """Latents as the model is to see them; as they are for flow matching."""
    if not hasattr(scheduler, "scale_model_input"):
        return latents
    return scheduler.scale_model_input(latents, timestep)


def add_noise(
    scheduler: Any, latents: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor
) -> torch.Tensor:
    """Latents `(B, C, H, W)` with as much of the noise as there is at a timestep.

    Raises:
        ValueError: the scheduler knows no such thing.
    """
    if hasattr(scheduler, "add_noise"):
        return scheduler.add_noise(latents, noise, timestep.expand(len(latents)))
    if hasattr(scheduler, "scale_noise"):  # flow matching
        return scheduler.scale_noise(latents, timestep.expand(len(latents)), noise)
    raise ValueError(
        f"{type(scheduler).__name__} cannot start from a picture (it has no `add_noise`): use "
        "another scheduler."
    )
