"""The diffusion: what a denoiser is trained to predict, and the schedulers that sample it.

Noise prediction and v-prediction share the noise schedule of DDPM (Ho et al., 2020): 1000 steps of
linear betas, as Diffusers' schedulers compute them. Flow matching goes straight from the latents to
the noise.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
)

from .samplers import prediction_type_of

PredictionType = Literal["epsilon", "v_prediction", "flow"]
TimestepSampling = Literal["uniform", "logit_normal"]
NUM_TIMESTEPS = 1000
LOWEST_GRID_END = 800  # of the timesteps that a grid of whole ones must cover
NOISE_SCHEDULE = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}


@dataclass(frozen=True)
class Objective:
    """The quantity that the model learns to predict, given `alpha * latents + sigma * noise`.

    "epsilon": the noise, where `alpha**2` is the product of DDPM's alphas up to the timestep and
    `sigma**2 = 1 - alpha**2`. "v_prediction": `alpha * noise - sigma * latents` in the same
    schedule (Salimans & Ho, 2022, section 4). "flow": `noise - latents`, where `alpha = 1 - sigma`
    and `sigma` runs evenly from 0 to 1 (Liu et al., 2023, eq. 1).

    Args:
        prediction_type: one of the three.
        min_snr_gamma: cap of the signal-to-noise ratio in the loss weights; None weighs all
            timesteps alike. Not for "flow".
        flow_shift: s in `s * sigma / (1 + (s - 1) * sigma)`, which moves the levels of "flow"
            towards noise, in training and in sampling (Esser et al., 2024, section 5.3.2). Only for
            "flow".

    Raises:
        ValueError: for another prediction type.
    """

    prediction_type: PredictionType = "epsilon"
    min_snr_gamma: float | None = None
    flow_shift: float = 1.0

    def __post_init__(self) -> None:
        """Check the prediction type."""
        if self.prediction_type not in get_args(PredictionType):
            raise ValueError(
                f"The prediction type is {self.prediction_type!r}; expected one of "
                f"{', '.join(get_args(PredictionType))}."
            )

    @property
    def is_flow(self) -> bool:
        """Whether this is flow matching."""
        return self.prediction_type == "flow"

    def timesteps(self, positions: torch.Tensor) -> torch.Tensor:
        """Return the timesteps `(B,)` at positions `(B,)` in [0, 1), from latents to noise.

        int64 in 0 .. 999; for "flow" `1000 * sigma` in float32 (the sampler passes the integer
        part).
        """
        if self.is_flow:
            sigmas = positions.to(torch.float32)
            shifted = self.flow_shift * sigmas / (1 + (self.flow_shift - 1) * sigmas)
            return shifted * NUM_TIMESTEPS
        return (positions * NUM_TIMESTEPS).long().clamp(max=NUM_TIMESTEPS - 1)

    def add_noise(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Return `alpha * latents + sigma * noise`, `(B, C, H, W)`, at timesteps `(B,)`."""
        alpha, sigma = self.levels(timesteps)
        return alpha * latents + sigma * noise

    def target(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Return the target of the prediction, `(B, C, H, W)`."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "v_prediction":
            alpha, sigma = self.levels(timesteps)
            return alpha * noise - sigma * latents
        return noise - latents

    def denoised(
        self, noised: torch.Tensor, prediction: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Return the latents that a prediction for noised ones implies, all `(B, C, H, W)`."""
        alpha, sigma = self.levels(timesteps)
        if self.prediction_type == "epsilon":
            return (noised - sigma * prediction) / alpha
        if self.prediction_type == "v_prediction":
            return alpha * noised - sigma * prediction
        return noised - sigma * prediction

    def move(
        self,
        noised: torch.Tensor,
        prediction: torch.Tensor,
        timesteps: torch.Tensor,
        goals: torch.Tensor,
    ) -> torch.Tensor:
        """Move noised latents along the ODE from `timesteps` to `goals`, both `(B,)`, in one step.

        This is a step of DDIM (Song et al., 2021, eq. 12 without noise), or Euler's for "flow": the
        latents and the noise that the prediction implies are mixed for the goal. A step to
        `clean_timestep` gives the latents.
        """
        latents = self.denoised(noised, prediction, timesteps)
        if self.prediction_type == "epsilon":
            noise = prediction
        elif self.prediction_type == "v_prediction":
            alpha, sigma = self.levels(timesteps)
            noise = sigma * noised + alpha * prediction
        else:
            noise = latents + prediction
        return self.add_noise(latents, noise, goals)

    @property
    def clean_timestep(self) -> int:
        """The timestep without noise: for noise and v-prediction, the one before the first."""
        return 0 if self.is_flow else -1

    def grid(self, positions: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return each position's timestep on a grid of `steps`, and the grid's next lower one.

        The grid is that of Diffusers' `LCMScheduler`; for "flow", it is even before the shift. The
        timestep below the lowest one is `clean_timestep`.

        Args:
            positions: `(B,)` in [0, 1).
            steps: number of timesteps of the grid, at most `NUM_TIMESTEPS`.

        Returns:
            Two tensors `(B,)`, of the dtype of `timesteps`.
        """
        lower = (positions * steps).long().clamp(max=steps - 1)
        if self.is_flow:
            return self.timesteps((lower + 1) / steps), self.timesteps(lower / steps)
        stride = NUM_TIMESTEPS // steps
        return (lower + 1) * stride - 1, lower * stride - 1

    def require_grid(self, steps: int) -> None:
        """Raise ValueError unless a grid of `steps` reaches far from the latents to the noise."""
        if self.is_flow or _grid_end(steps) >= LOWEST_GRID_END:
            return
        good = [one for one in range(1, NUM_TIMESTEPS + 1) if _grid_end(one) >= LOWEST_GRID_END]
        raise ValueError(
            f"A grid of {steps} whole timesteps ends at {_grid_end(steps)} of {NUM_TIMESTEPS}, far "
            f"from the noise; expected at least {LOWEST_GRID_END}, as with "
            f"{min(good, key=lambda one: abs(one - steps))}"
        )

    def weights(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the weights of the errors at timesteps `(B,)`, `(B,)` (Hang et al., 2023).

        With `min_snr_gamma`, `min(snr, gamma) / snr` for noise prediction and
        `min(snr, gamma) / (snr + 1)` for v-prediction: either way the error of the clean latents is
        weighed by `min(snr, gamma)`, the signal-to-noise ratio being `alpha**2 / sigma**2`.
        """
        if self.min_snr_gamma is None:
            return torch.ones(len(timesteps), device=timesteps.device)
        alpha, sigma = self.levels(timesteps)
        snr = (alpha / sigma).square().flatten()
        normaliser = snr if self.prediction_type == "epsilon" else snr + 1
        return snr.clamp(max=self.min_snr_gamma) / normaliser

    def sampling_scheduler(self) -> DPMSolverMultistepScheduler:
        """Return DPM-Solver++ 2M for this prediction, over the noise levels of the training."""
        if self.is_flow:
            return DPMSolverMultistepScheduler(
                num_train_timesteps=NUM_TIMESTEPS,
                prediction_type="flow_prediction",
                use_flow_sigmas=True,
                flow_shift=self.flow_shift,
            )
        return DPMSolverMultistepScheduler(
            num_train_timesteps=NUM_TIMESTEPS,
            prediction_type=self.prediction_type,
            **NOISE_SCHEDULE,
        )

    def few_step_scheduler(self, steps: int) -> LCMScheduler | FlowMatchLCMScheduler:
        """Return the scheduler of a consistency model that was trained on a grid of `steps`."""
        if self.is_flow:
            return FlowMatchLCMScheduler(num_train_timesteps=NUM_TIMESTEPS, shift=self.flow_shift)
        return LCMScheduler(
            num_train_timesteps=NUM_TIMESTEPS,
            prediction_type=self.prediction_type,
            original_inference_steps=steps,
            clip_sample=False,
            **NOISE_SCHEDULE,
        )

    def levels(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return alpha and sigma at timesteps `(B,)`, both `(B, 1, 1, 1)` float32."""
        if self.is_flow:
            sigma = (timesteps / NUM_TIMESTEPS).view(-1, 1, 1, 1)
            return 1 - sigma, sigma
        products = _alphas_cumprod(timesteps.device)[timesteps + 1]
        products = products.view(-1, 1, 1, 1)
        return products.sqrt(), (1 - products).sqrt()


def _grid_end(steps: int) -> int:
    """Return the timesteps that a grid of `steps` whole, even strides covers."""
    return NUM_TIMESTEPS // steps * steps


@functools.lru_cache(maxsize=8)
def _alphas_cumprod(device: torch.device) -> torch.Tensor:
    """Return the products of DDPM's alphas, `(1 + NUM_TIMESTEPS,)` float32; cached per device.

    The first is 1, that of `Objective.clean_timestep`.
    """
    scheduler = DDPMScheduler(num_train_timesteps=NUM_TIMESTEPS, **NOISE_SCHEDULE)
    return torch.cat([torch.ones(1), scheduler.alphas_cumprod]).to(device)


def other_noise_schedule(scheduler_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a scheduler's configuration says of the noise that training does differently.

    Settings that only matter for sampling, such as Karras' noise levels, are not part of it.
    """
    ours: dict[str, Any] = {"num_train_timesteps": NUM_TIMESTEPS}
    if prediction_type_of(scheduler_config) != "flow":
        ours |= NOISE_SCHEDULE | {"trained_betas": None, "rescale_betas_zero_snr": False}
    return {
        name: scheduler_config[name]
        for name, value in ours.items()
        if scheduler_config.get(name, value) != value
    }


def sample_position(generator: torch.Generator, sampling: TimestepSampling) -> float:
    """Draw the position of a sample's timestep in [0, 1).

    "uniform" draws all positions equally often; "logit_normal" takes the sigmoid of a standard
    normal number, which favours the middle (Esser et al., 2024, section 3.1).
    """
    # In float32, as batches hold positions: rounding a float64 could give 1.
    device = generator.device
    if sampling == "uniform":
        return torch.rand(1, generator=generator, device=device, dtype=torch.float32).item()
    return torch.randn(1, generator=generator, device=device, dtype=torch.float32).sigmoid().item()


def denoising_errors(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error of each sample, `(B,)` float32, of tensors `(B, C, H, W)`."""
    return (prediction.float() - target.float()).square().flatten(1).mean(dim=1)
