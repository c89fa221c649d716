"""What a denoiser is trained on: timesteps, noise, targets and weights.

Predictions of the noise and of v share the noise schedule of DDPM (Ho et al., 2020): 1000 steps of
linear betas, as diffusers' schedulers compute them. Flow matching goes straight from the latents to
the noise.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler

PredictionType = Literal["epsilon", "v_prediction", "flow"]
TimestepSampling = Literal["uniform", "logit_normal"]
NOISE_SCHEDULE = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}


@dataclass(frozen=True)
class Objective:
    """What the model is to predict of `alpha * latents + sigma * noise`.

    "epsilon": the noise, where `alpha**2` is the product of DDPM's alphas up to the timestep and
    `sigma**2 = 1 - alpha**2`. "v_prediction": `alpha * noise - sigma * latents` in the same
    schedule (Salimans & Ho, 2022, section 4). "flow": `noise - latents`, where `alpha = 1 - sigma`
    and `sigma` runs evenly from 0 to 1 (Liu et al., 2023, eq. 1).

    Args:
        prediction_type: one of the three.
        min_snr_gamma: cap of the signal-to-noise ratio in the loss's weights; None weighs all
            timesteps the same. Not for "flow".
        flow_shift: s in `s * sigma / (1 + (s - 1) * sigma)`, which moves the levels of "flow"
            towards noise, in training and in sampling (Esser et al., 2024, section 5.3.2).
        num_timesteps: of the schedule. In "flow", the timestep is `sigma * num_timesteps`.

    Raises:
        ValueError: for a value out of range, or one that the prediction type has no use for.
    """

    prediction_type: PredictionType = "epsilon"
    min_snr_gamma: float | None = None
    flow_shift: float = 1.0
    num_timesteps: int = 1000

    def __post_init__(self) -> None:
        """Refuse what can't be trained on."""
        if self.prediction_type not in get_args(PredictionType):
            raise ValueError(
                f"The prediction type is {self.prediction_type!r}; expected one of "
                f"{', '.join(get_args(PredictionType))}."
            )
        if self.min_snr_gamma is not None and not self.min_snr_gamma > 0:
            raise ValueError(f"min_snr_gamma is {self.min_snr_gamma}; expected more than 0.")
        if self.min_snr_gamma is not None and self.is_flow:
            raise ValueError(
                "min-SNR weights are defined for noise and v-prediction. Leave min_snr_gamma out "
                "for flow matching; logit-normal timesteps favour the middle of its range."
            )
        if not (self.flow_shift > 0 and math.isfinite(self.flow_shift)):
            raise ValueError(f"flow_shift is {self.flow_shift}; expected a number above 0.")
        if self.flow_shift != 1 and not self.is_flow:
            raise ValueError(
                f"flow_shift is {self.flow_shift}, but the prediction type is "
                f"{self.prediction_type!r}: only flow matching can be shifted."
            )

    @property
    def is_flow(self) -> bool:
        """Whether this is flow matching."""
        return self.prediction_type == "flow"

    def timesteps(self, positions: torch.Tensor) -> torch.Tensor:
        """The timesteps `(B,)` at positions `(B,)` in [0, 1), from the latents to the noise.

        int64 in 0 .. num_timesteps - 1; for "flow" float32 (the sampler passes the integer part).
        """
        if self.is_flow:
            sigmas = positions.to(torch.float32)
            shifted = self.flow_shift * sigmas / (1 + (self.flow_shift - 1) * sigmas)
            return shifted * self.num_timesteps
        return (positions * self.num_timesteps).long().clamp(max=self.num_timesteps - 1)

    def add_noise(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """`alpha * latents + sigma * noise`: `(B, C, H, W)`, at timesteps `(B,)`."""
        alpha, sigma = self._levels(timesteps)
        return alpha * latents + sigma * noise

    def target(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """What the model is to predict, `(B, C, H, W)`."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "v_prediction":
            alpha, sigma = self._levels(timesteps)
            return alpha * noise - sigma * latents
        return noise - latents

    def weights(self, timesteps: torch.Tensor) -> torch.Tensor:
        """What the errors at timesteps `(B,)` count, `(B,)` (Hang et al., 2023).

        With `min_snr_gamma`, `min(snr, gamma) / snr` for noise prediction and
        `min(snr, gamma) / (snr + 1)` for v-prediction: either way the error of the clean latents is
        weighed by `min(snr, gamma)`, the signal-to-noise ratio being `alpha**2 / sigma**2`.
        """
        if self.min_snr_gamma is None:
            return torch.ones(len(timesteps), device=timesteps.device)
        alpha, sigma = self._levels(timesteps)
        snr = (alpha / sigma).square().flatten()
        normaliser = snr if self.prediction_type == "epsilon" else snr + 1
        return snr.clamp(max=self.min_snr_gamma) / normaliser

    def sampling_scheduler(self) -> DPMSolverMultistepScheduler:
        """DPM-Solver++ 2M for what is predicted, over the noise levels that are trained."""
        if self.is_flow:
            return DPMSolverMultistepScheduler(
                num_train_timesteps=self.num_timesteps,
                prediction_type="flow_prediction",
                use_flow_sigmas=True,
                flow_shift=self.flow_shift,
            )
        return DPMSolverMultistepScheduler(
            num_train_timesteps=self.num_timesteps,
            prediction_type=self.prediction_type,
            **NOISE_SCHEDULE,
        )

    def _levels(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Alpha and sigma, both `(B, 1, 1, 1)` float32."""
        if self.is_flow:
            sigma = (timesteps / self.num_timesteps).view(-1, 1, 1, 1)
            return 1 - sigma, sigma
        products = _alphas_cumprod(self.num_timesteps, timesteps.device)[timesteps]
        products = products.view(-1, 1, 1, 1)
        return products.sqrt(), (1 - products).sqrt()


@functools.lru_cache(maxsize=8)
def _alphas_cumprod(num_timesteps: int, device: torch.device) -> torch.Tensor:
    """The products of DDPM's alphas, `(num_timesteps,)` float32."""
    scheduler = DDPMScheduler(num_train_timesteps=num_timesteps, **NOISE_SCHEDULE)
    return scheduler.alphas_cumprod.to(device)


def sample_position(generator: torch.Generator, sampling: TimestepSampling) -> float:
    """Draw where in [0, 1) a sample's timestep lies.

    "uniform" takes every position as often; "logit_normal" takes the sigmoid of a standard normal
    number, which favours the middle (Esser et al., 2024, section 3.1).
    """
    # In float32, as batches hold positions: rounding a float64 could give 1.
    if sampling == "uniform":
        return torch.rand(1, generator=generator, device=generator.device).item()
    return torch.randn(1, generator=generator, device=generator.device).sigmoid().item()


def denoising_errors(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The mean squared error of each sample in float32: `(B, C, H, W)` twice to `(B,)`."""
    return (prediction.float() - target.float()).square().flatten(1).mean(dim=1)
