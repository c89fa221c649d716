"""The differences between schedulers of Diffusers: what they name differently, or lack."""

from __future__ import annotations

import inspect
import logging
import math
import reprlib
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchLCMScheduler

from ..config import is_finite_number
from .samplers import check_levels, config_of, prediction_type_of

logger = logging.getLogger(__name__)
_defaults = threading.Lock()
_inside = 0  # calls within `default_settings`
_outer_dtype = torch.float32


@contextmanager
def default_settings() -> Iterator[None]:
    """Compute with PyTorch's original default dtype and device, float32 and the CPU.

    A seed then means the same picture whatever defaults a program has set. Its default dtype, which
    all threads share, is set again when the last one has left.
    """
    global _inside, _outer_dtype
    device = torch.empty(0).device
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


def check_step(scheduler: Any) -> None:
    """Refuse a scheduler whose step needs other values than prediction, timestep and latents."""
    parameters = inspect.signature(scheduler.step).parameters.values()
    named = [one for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]
    needed = [one.name for one in named if one.default is one.empty]
    if len(needed) != 3:
        raise ValueError(
            f"{type(scheduler).__name__} is not for this model: its step needs {needed}, not a "
            "prediction, a timestep and latents. Use another scheduler, such as "
            "DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)."
        )


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
        f"{type(scheduler).__name__} has no prediction_type, so it may misinterpret the model's "
        "prediction and give blotchy pictures. Use a scheduler that has one, such as "
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
            "The new scheduler expects the model to predict %r, the previous one %r. Unless you "
            "replace the model too, create it with %s.from_config(pipe.scheduler.config), or "
            "choose a scheduler that supports the model's prediction type.",
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
        num_inference_steps: number of steps in the whole schedule.
        strength: in [0, 1]; 1 starts from noise.
        custom: a schedule by name, "timesteps" or "sigmas", instead of a number of steps.
    """
    _check_custom(scheduler, custom or {})
    if not custom and (schedule := _few_steps(scheduler, num_inference_steps, strength)):
        scheduler.set_timesteps(device=device, **schedule)
        return 0
    scheduler.set_timesteps(
        device=device, **(custom or {"num_inference_steps": num_inference_steps})
    )
    whole = not scheduler.timesteps.is_floating_point()
    if custom and whole and any(one % 1 for one in custom.get("timesteps", ())):
        raise ValueError(f"{type(scheduler).__name__} takes whole timesteps: round the given ones.")
    order = scheduler.order
    steps = math.ceil(len(scheduler.timesteps) / order)
    first = (steps - int(steps * strength)) * order
    if type(scheduler).__name__ == "LMSDiscreteScheduler":  # importing it would import SciPy
        # In the middle of its schedule, it would weigh derivatives of steps that were not taken.
        scheduler.timesteps, scheduler.sigmas = (
            values[first:] for values in (scheduler.timesteps, scheduler.sigmas)
        )
        return 0
    return first


def _check_custom(scheduler: Any, custom: Mapping[str, Any]) -> None:
    """Refuse a custom schedule that is no sequence of numbers, or has negative ones.

    Nor may it have more noise than a model of this scheduler was trained on.
    """
    flow = prediction_type_of(config_of(scheduler)) == "flow"
    steps = getattr(scheduler, "config", {}).get("num_train_timesteps", math.inf)
    most = {"timesteps": steps if flow else steps - 1, "sigmas": 1 if flow else math.inf}
    for name, values in custom.items():
        numbers = (values if hasattr(values, "tolist") else np.array(values)).tolist()
        if not isinstance(numbers, list) or not all(
            is_finite_number(one) and one >= 0 for one in numbers
        ):
            raise ValueError(
                f"{name} must be a list of finite numbers of at least 0, got "
                f"{reprlib.repr(values)}."
            )
        if numbers and max(numbers) > most[name]:
            raise ValueError(
                f"{name} has {reprlib.repr(max(numbers))}, but the model was trained up to "
                f"{most[name]}: start at that or less."
            )


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
    check_levels(config_of(scheduler), steps)
    most = scheduler.config.original_inference_steps
    if 0 < (left := int(most * strength)) < steps:
        logger.warning(
            "Only %d of the %d steps are taken: the model has %d noise levels, of which the "
            "strength %g leaves that many.",
            left,
            steps,
            most,
            strength,
        )
    steps = min(steps, left)
    return {"num_inference_steps": steps, "strength": strength} if steps else {}


def check_schedule(scheduler: Any) -> None:
    """Raise `ValueError` for timesteps that do not lead from noise to a picture.

    Timesteps count the steps of training, of which there are many: those of a schedule that starts
    at 2 or less and are not whole are on another scale, and a warning says so.

    Timesteps must not ascend from step to step, and must exist: those of a scheduler that counts in
    whole ones are at least 0. The halves of a step of order 2 may ascend by rounding. A solver of
    order 1 that goes by noise levels divides by their differences, which must not be 0;
    neighbouring timesteps that are the same after rounding do no harm to it.
    """
    timesteps, sigmas = scheduler.timesteps, getattr(scheduler, "sigmas", None)
    sound = len(timesteps) > 0 and bool((timesteps[:: scheduler.order].diff() <= 0).all())
    if sound and not timesteps.is_floating_point():
        sound = bool(timesteps[-1] >= 0)
    if sound and sigmas is not None and scheduler.order == 1:
        sound = bool((sigmas[: len(timesteps)].diff() < 0).all())
    steps = getattr(scheduler, "config", {}).get("num_train_timesteps", 0)
    if sound and steps > 2 and timesteps.is_floating_point() and timesteps[0] <= 2:
        logger.warning(
            "%s starts at timestep %.3g, but the model counts timesteps up to %s, so pictures will "
            "be blotchy. Use a scheduler that counts timesteps as the model does.",
            type(scheduler).__name__,
            float(timesteps[0]),
            steps,
        )
    if not sound:
        raise ValueError(
            f"The {len(timesteps)} timesteps must each be lower than the one before, and at least "
            "0: take fewer steps, or correct the given timesteps or sigmas."
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
    """Add the noise of a timestep to latents `(B, C, H, W)`."""
    if hasattr(scheduler, "add_noise"):
        return scheduler.add_noise(latents, noise, timestep.expand(len(latents)))
    if hasattr(scheduler, "scale_noise"):  # flow matching
        return scheduler.scale_noise(latents, timestep.expand(len(latents)), noise)
    raise ValueError(
        f"{type(scheduler).__name__} cannot start from a picture (it has no `add_noise`): use "
        "another scheduler."
    )
