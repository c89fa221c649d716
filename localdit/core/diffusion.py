"""The diffusion: what a denoiser is trained to predict, and the schedulers that sample it.

Noise prediction and v-prediction share the noise schedule of DDPM (Ho et al., 2020): 1000 steps of
linear betas, as Diffusers' schedulers compute them. Flow matching goes straight from the latents to
the noise. The second half of the module evens out what schedulers of different families name
differently or lack.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
)

from .samplers import config_of, prediction_type_of

PredictionType = Literal["epsilon", "v_prediction", "flow"]
TimestepSampling = Literal["uniform", "logit_normal"]
logger = logging.getLogger(__name__)
_defaults = threading.Lock()
_inside = 0  # calls within `default_settings`
_outer_dtype = torch.float32
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
        """Check the values, and that they go together."""
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
        """Return the timesteps `(B,)` at positions `(B,)` in [0, 1), from latents to noise.

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
            steps: number of timesteps of the grid, at most `num_timesteps`.

        Returns:
            Two tensors `(B,)`, of the dtype of `timesteps`.
        """
        lower = (positions * steps).long().clamp(max=steps - 1)
        if self.is_flow:
            return self.timesteps((lower + 1) / steps), self.timesteps(lower / steps)
        stride = self.num_timesteps // steps
        return (lower + 1) * stride - 1, lower * stride - 1

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

    def few_step_scheduler(self, steps: int) -> LCMScheduler | FlowMatchLCMScheduler:
        """Return the scheduler of a consistency model that was trained on a grid of `steps`."""
        if self.is_flow:
            return FlowMatchLCMScheduler(
                num_train_timesteps=self.num_timesteps, shift=self.flow_shift
            )
        return LCMScheduler(
            num_train_timesteps=self.num_timesteps,
            prediction_type=self.prediction_type,
            original_inference_steps=steps,
            clip_sample=False,
            **NOISE_SCHEDULE,
        )

    def levels(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return alpha and sigma at timesteps `(B,)`, both `(B, 1, 1, 1)` float32."""
        if self.is_flow:
            sigma = (timesteps / self.num_timesteps).view(-1, 1, 1, 1)
            return 1 - sigma, sigma
        products = _alphas_cumprod(self.num_timesteps, timesteps.device)[timesteps + 1]
        products = products.view(-1, 1, 1, 1)
        return products.sqrt(), (1 - products).sqrt()


@functools.lru_cache(maxsize=8)
def _alphas_cumprod(num_timesteps: int, device: torch.device) -> torch.Tensor:
    """Return the products of DDPM's alphas, `(1 + num_timesteps,)` float32; cached per device.

    The first is 1, that of `Objective.clean_timestep`.
    """
    scheduler = DDPMScheduler(num_train_timesteps=num_timesteps, **NOISE_SCHEDULE)
    return torch.cat([torch.ones(1), scheduler.alphas_cumprod]).to(device)


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


@contextmanager
def default_settings() -> Iterator[None]:
    """Compute with PyTorch's original default dtype and device, float32 and the CPU.

    A seed then means the same picture whatever defaults a program has set. Its default dtype, which
    all threads share, is set again when the last one has left.
    """
    global _inside, _outer_dtype
    device = torch.get_default_device()
    with _defaults:
        if not _inside:
            _outer_dtype = torch.get_default_dtype()
            torch.set_default_dtype(torch.float32)
        _inside += 1
    try:
        with nullcontext() if device.type == "cpu" else torch.device("cpu"):
            yield
    finally:
        with _defaults:
            _inside -= 1
            if not _inside:
                torch.set_default_dtype(_outer_dtype)


def check_prediction(scheduler: Any) -> None:
    """Refuse a scheduler that can't take the model's prediction for what it is, or warn of it.

    Schedulers without a `prediction_type`, other than those of flow matching, expect one that they
    do not name.

    Raises:
        ValueError: if the configuration that such a scheduler was made from names another
            prediction than noise.
    """
    kind = prediction_type_of(config_of(scheduler))
    known = inspect.signature(type(scheduler).__init__).parameters
    if kind == "flow" or "prediction_type" in known:
        return
    message = (
        f"{type(scheduler).__name__} has no prediction_type, so it may take the model's prediction "
        "for something else and draw blotches. Use a scheduler that has one, such as "
        "DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)."
    )
    if kind != "epsilon":
        raise ValueError(f"The model predicts {kind!r}. {message}")
    logger.warning("%s", message)


def warn_of_other_prediction(before: Any, now: Any) -> None:
    """Log a warning if a scheduler takes another prediction than the one that it replaces."""
    if not (hasattr(before, "config") and hasattr(now, "config")):
        return
    kinds = [prediction_type_of(config_of(one)) for one in (before, now)]
    if kinds[0] != kinds[1]:
        logger.warning(
            "The new scheduler takes the model's prediction for %r, the one before for %r. Unless "
            "the model is replaced too, make it with %s.from_config(pipe.scheduler.config), or "
            "choose one that has this prediction type.",
            kinds[1],
            kinds[0],
            type(now).__name__,
        )


def set_timesteps(
    scheduler: Any,
    device: torch.device,
    num_inference_steps: int,
    strength: float = 1.0,
    custom: Mapping[str, Any] | None = None,
) -> int:
    """Set a scheduler's timesteps, and return the index of the first one to take.

    The last `int(steps * strength)` steps are taken. Of few steps, the last ones would be too
    coarse: the schedulers of few-step models take all of theirs, from the noise level of the
    strength.

    Args:
        scheduler: its timesteps are set.
        device: device of the timesteps.
        num_inference_steps: number of steps in the whole schedule.
        strength: in [0, 1]; 1 starts from noise.
        custom: a schedule by name, "timesteps" or "sigmas", instead of a number of steps.
    """
    if not custom and (schedule := _few_steps(scheduler, num_inference_steps, strength)):
        scheduler.set_timesteps(device=device, **schedule)
        return 0
    scheduler.set_timesteps(
        device=device, **(custom or {"num_inference_steps": num_inference_steps})
    )
    order = scheduler.order
    steps = math.ceil(len(scheduler.timesteps) / order)
    return (steps - int(steps * strength)) * order


def _few_steps(scheduler: Any, steps: int, strength: float) -> dict[str, Any]:
    """Return the schedule of a few-step model as arguments of `set_timesteps`, or else nothing.

    LCM's schedulers start at a strength themselves. They have `original_inference_steps` noise
    levels, and a low strength may leave fewer levels than there are steps.

    By itself, LCM for flow matching would take its last step at hardly any noise; the evenly spaced
    levels `1 - i / steps` are those of Diffusers' pipelines for flows.
    """
    if isinstance(scheduler, FlowMatchLCMScheduler):
        levels = [strength * (1 - i / steps) for i in range(steps)]
        return {"sigmas": levels} if strength > 0 else {}
    if "strength" not in inspect.signature(scheduler.set_timesteps).parameters:
        return {}
    if strength < 1:
        steps = min(steps, int(scheduler.config.original_inference_steps * strength))
    return {"num_inference_steps": steps, "strength": strength} if steps else {}


def check_schedule(scheduler: Any) -> None:
    """Raise `ValueError` for timesteps that do not lead from noise to a picture.

    Timesteps count the steps of training, of which there are many: those of a schedule that starts
    at 2 or less and are not whole are on another scale, and a warning says so.

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
    steps = getattr(scheduler, "config", {}).get("num_train_timesteps", 0)
    if sound and steps > 2 and timesteps.is_floating_point() and timesteps[0] <= 2:
        logger.warning(
            "%s starts at timestep %.3g, but the model counts timesteps up to %s, so pictures will "
            "be blotches. Use a scheduler that counts as the model does.",
            type(scheduler).__name__,
            float(timesteps[0]),
            steps,
        )
    if not sound:
        raise ValueError(
            f"The {len(timesteps)} timesteps must each be lower than the one before, and at least "
            "0: take fewer steps, or correct the timesteps or sigmas given."
        )


def initial_scale(scheduler: Any) -> Any:
    """Return the standard deviation of the noise that sampling starts from; 1 for flow matching."""
    return getattr(scheduler, "init_noise_sigma", 1.0)


def scale_input(scheduler: Any, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """Scale latents as the scheduler wants the model to see them; flow matching scales nothing."""
    if not hasattr(scheduler, "scale_model_input"):
        return latents
    return scheduler.scale_model_input(latents, timestep)


def add_noise(
    scheduler: Any, latents: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor
) -> torch.Tensor:
    """Add the noise of a timestep to latents `(B, C, H, W)`.

    Raises:
        ValueError: if the scheduler can't add noise.
    """
    if hasattr(scheduler, "add_noise"):
        return scheduler.add_noise(latents, noise, timestep.expand(len(latents)))
    if hasattr(scheduler, "scale_noise"):  # flow matching
        return scheduler.scale_noise(latents, timestep.expand(len(latents)), noise)
    raise ValueError(
        f"{type(scheduler).__name__} cannot start from a picture (it has no `add_noise`): use "
        "another scheduler."
    )
