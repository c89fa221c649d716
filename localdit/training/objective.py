"""What a denoiser is trained on: timesteps, targets, weights and loss, as pure functions.

The noise schedule is that of DDPM (Ho et al., 2020): 1000 steps of linear betas, as diffusers'
schedulers compute them.
"""

from __future__ import annotations

from typing import Literal

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler

PredictionType = Literal["epsilon", "v_prediction"]
TimestepSampling = Literal["uniform", "logit_normal"]
NOISE_SCHEDULE = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}


def training_scheduler(prediction_type: PredictionType, num_steps: int = 1000) -> DDPMScheduler:
    """The forward process that training draws from."""
    return DDPMScheduler(
        num_train_timesteps=num_steps, prediction_type=prediction_type, **NOISE_SCHEDULE
    )


def sampling_scheduler(noise_scheduler: DDPMScheduler) -> DPMSolverMultistepScheduler:
    """DPM-Solver++ 2M over the noise schedule and for the prediction that was trained."""
    return DPMSolverMultistepScheduler(
        num_train_timesteps=noise_scheduler.config.num_train_timesteps,
        prediction_type=noise_scheduler.config.prediction_type,
        **NOISE_SCHEDULE,
    )


def sample_timesteps(
    batch_size: int, num_steps: int, sampling: TimestepSampling, generator: torch.Generator
) -> torch.Tensor:
    """Timesteps (B,) in 0 .. num_steps - 1, int64, on the generator's device.

    "uniform" draws each as often; "logit_normal" draws `sigmoid(N(0, 1))` of the range, which
    favours its middle (Esser et al., 2024, section 3.1).
    """
    device = generator.device
    if sampling == "uniform":
        return torch.randint(num_steps, (batch_size,), generator=generator, device=device)
    position = torch.randn(batch_size, generator=generator, device=device).sigmoid()
    return (position * num_steps).long().clamp(max=num_steps - 1)


def training_target(
    scheduler: DDPMScheduler, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """What the model is to predict of `sqrt(a) latents + sqrt(1 - a) noise`; (B, C, H, W).

    "epsilon": the noise. "v_prediction": `sqrt(a) noise - sqrt(1 - a) latents` (Salimans & Ho,
    2022, section 4), `a` being the product of alphas up to the timestep.
    """
    if scheduler.config.prediction_type == "epsilon":
        return noise
    return scheduler.get_velocity(latents, noise, timesteps)


def min_snr_weights(
    scheduler: DDPMScheduler, timesteps: torch.Tensor, gamma: float
) -> torch.Tensor:
    """Loss weights (B,) that cap the signal-to-noise ratio at `gamma` (Hang et al., 2023, eq. 8).

    `min(snr, gamma) / snr` for noise prediction, `min(snr, gamma) / (snr + 1)` for v-prediction:
    both weigh the error of the clean latents by `min(snr, gamma)`.
    """
    alphas = scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    snr = alphas / (1 - alphas)
    normaliser = snr if scheduler.config.prediction_type == "epsilon" else snr + 1
    return snr.clamp(max=gamma) / normaliser


def denoising_loss(
    prediction: torch.Tensor, target: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean squared error in float32, a scalar; `weights` (B,) scale the samples."""
    errors = (prediction.float() - target.float()).square().flatten(1).mean(dim=1)  # (B,)
    return errors.mean() if weights is None else (errors * weights).mean()


def size_conditions(
    image_size: int, batch_size: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """`added_cond_kwargs` of square pictures: "resolution" (B, 2) and "aspect_ratio" (B, 1)."""
    resolution = torch.full((batch_size, 2), float(image_size), device=device)
    return {"resolution": resolution, "aspect_ratio": torch.ones(batch_size, 1, device=device)}
