"""How a model is sampled: the steps and the guidance that suit it, and samplers by name.

A sampler is a scheduler of Diffusers. It keeps what belongs to the model: its noise schedule and
its prediction type, or its shift for flow matching; and the timesteps that a few-step model was
trained on. All else is the sampler's own, so a name means the same for every folder.

Diffusers is imported by `make_sampler` only, so that commands check a name at no cost.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..config import INDEX, Config, config_field, with_settings
from ..errors import Field, FieldError, FieldValueError, Vocabulary
from ..files import read_json

__all__ = ["make_sampler", "suitable_samplers"]

logger = logging.getLogger(__name__)

MOST_FEW_STEPS = 8
LCM_LEVELS = 50  # noise levels of LCM's schedulers unless the model was trained on others
WITH_LEVELS = ("LCMScheduler", "TCDScheduler")
FEW_STEP_SCHEDULERS = (*WITH_LEVELS, "FlowMatchLCMScheduler")
OF_MODEL = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
    "prediction_type", "rescale_betas_zero_snr", "original_inference_steps",
)  # fmt: skip


@dataclass(frozen=True)
class SamplingSettings:
    """The settings that suit a model, where a call gives none.

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range, as in `Config`.
    """

    num_inference_steps: int = Config.denoising_steps
    guidance_scale: float = Config.guidance_scale  # 1 or less: no guidance

    def __post_init__(self) -> None:
        """Check the values."""
        own = asdict(self)
        try:
            with_settings(Config(), own)
        except FieldError as error:
            raise type(error)(error.worded(Vocabulary({name: name for name in own}))) from None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> SamplingSettings:
        """Return the settings that a pipeline's configuration names, or else the defaults."""
        return cls(**{one.name: config[one.name] for one in fields(cls) if one.name in config})

    @property
    def few_steps(self) -> bool:
        """True if the model is made for few steps without guidance."""
        return self.num_inference_steps <= MOST_FEW_STEPS and self.guidance_scale <= 1


def read_settings(folder: Path) -> SamplingSettings:
    """Return the settings that the folder of a pipeline names.

    A folder without them, and anything that is no folder of a pipeline, has the defaults.
    """
    index = folder / INDEX
    if not index.is_file():
        return SamplingSettings()
    try:
        return SamplingSettings.of(read_json(index))
    except FieldError as error:
        raise type(error)(f"{index}: {error}") from None


@dataclass(frozen=True)
class Sampler:
    """A way to sample."""

    diffusion: str  # scheduler of Diffusers for models that predict noise or velocity
    flow: str | None = None  # scheduler for models of flow matching; None if there is none
    settings: Mapping[str, Any] = field(default_factory=dict)  # arguments of the scheduler
    least_steps: int = 1  # the fewest steps that give pictures of a diffusion model


_DPM = "DPMSolverMultistepScheduler"
# Diffusers' defaults do not fit: the first of few steps has to start at the noisiest timestep (Lin
# et al., 2024, section 3.3), and latents exceed the range that a clipped sample is cut to.
_TRAILING = {"timestep_spacing": "trailing"}
_UNCLIPPED = {"clip_sample": False, **_TRAILING}
# The first is that of the released model and of the model in the box. PNDM is left out: if it
# starts from a picture, it ends before the noise is gone.
SAMPLERS = {
    "dpm++2m": Sampler(_DPM, _DPM),
    "dpm++2m-karras": Sampler(_DPM, settings={"use_karras_sigmas": True}),
    "dpm++2m-sde": Sampler(_DPM, _DPM, {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": Sampler("UniPCMultistepScheduler", "UniPCMultistepScheduler"),
    "euler": Sampler("EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", _TRAILING),
    "euler-a": Sampler("EulerAncestralDiscreteScheduler", settings=_TRAILING),
    "heun": Sampler(
        "HeunDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", _TRAILING, least_steps=5
    ),
    "ddim": Sampler("DDIMScheduler", settings=_UNCLIPPED),
    "ddpm": Sampler("DDPMScheduler", settings=_UNCLIPPED),
    "lcm": Sampler("LCMScheduler", "FlowMatchLCMScheduler"),
}


def prediction_type_of(scheduler_config: Mapping[str, Any]) -> str:
    """Return the prediction type that a scheduler's configuration is made for.

    Args:
        scheduler_config: as `scheduler_config.json` has it.

    Returns:
        "epsilon", "v_prediction", "flow", or another value of the configuration's
        `prediction_type`.
    """
    kind = scheduler_config.get("prediction_type", "epsilon")
    flow = scheduler_config.get("use_flow_sigmas") or kind == "flow_prediction"
    if flow or "FlowMatch" in scheduler_config.get("_class_name", ""):
        return "flow"
    return kind


def flow_shift_of(scheduler_config: Mapping[str, Any]) -> float:
    """Return the shift of a flow matching scheduler's configuration; see `Objective`.

    Raises:
        ValueError: if it is not a number above 0.
    """
    name = "shift" if "FlowMatch" in scheduler_config.get("_class_name", "") else "flow_shift"
    shift = scheduler_config.get(name, 1.0)
    if not isinstance(shift, int | float) or not 0 < shift < math.inf:
        raise ValueError(f"The scheduler's {name} is {shift!r}; expected a number above 0.")
    return shift


def config_of(scheduler: Any) -> dict[str, Any]:
    """Return the configuration of a scheduler, as `scheduler_config.json` has it."""
    return {**getattr(scheduler, "config", {}), "_class_name": type(scheduler).__name__}


def suitable_samplers(scheduler_config: Mapping[str, Any]) -> list[str]:
    """Return the names of the samplers for a model, given the configuration of its scheduler."""
    kind = prediction_type_of(scheduler_config)
    return [name for name, sampler in SAMPLERS.items() if _class_name(sampler, kind)]


def check_sampler(
    name: str, scheduler_config: Mapping[str, Any], num_inference_steps: int | None = None
) -> None:
    """Refuse a sampler that does not exist or does not suit the model, or too few steps.

    Args:
        name: one of `SAMPLERS`.
        scheduler_config: of the model's scheduler, as `scheduler_config.json` has it.
        num_inference_steps: the number of steps, if it is known.
    """
    suitable, kind = suitable_samplers(scheduler_config), prediction_type_of(scheduler_config)
    if name not in suitable:
        raise FieldValueError(
            "{field} is {name!r}, {reason}; samplers that suit this model: {suitable}",
            field=config_field("sampler"),
            name=name,
            reason=f"which can't sample a model that predicts {kind!r}"
            if name in SAMPLERS
            else "and there is no sampler of that name",
            suitable=", ".join(suitable) or f"none, as its scheduler is for {kind!r}",
        )
    least = SAMPLERS[name].least_steps if kind != "flow" else 1
    if num_inference_steps is not None and num_inference_steps < least:
        raise FieldValueError(
            "{field} is {steps}, but the sampler {name!r} needs at least {least}; take more steps, "
            "or another sampler, such as 'euler'",
            field=Field("num_inference_steps"),
            steps=num_inference_steps,
            name=name,
            least=least,
        )


def check_levels(
    scheduler_config: Mapping[str, Any], num_inference_steps: int, sampler: str | None = None
) -> None:
    """Refuse more steps than the scheduler of a few-step model has noise levels.

    Args:
        scheduler_config: as `scheduler_config.json` has it.
        num_inference_steps: the number of steps from noise to a picture.
        sampler: a suitable one of `SAMPLERS` that replaces the scheduler.
    """
    most = scheduler_config.get("original_inference_steps", LCM_LEVELS)
    name = scheduler_config.get("_class_name")
    if sampler is not None:
        name = _class_name(SAMPLERS[sampler], prediction_type_of(scheduler_config))
    if name in WITH_LEVELS and num_inference_steps > most:
        raise FieldValueError(
            "{field} is {steps}, but the {scheduler} of this model has {most} noise levels "
            "(original_inference_steps); expected at most that many steps.",
            field=Field("num_inference_steps"),
            steps=num_inference_steps,
            scheduler=name,
            most=most,
        )


def make_sampler(name: str, scheduler: Any, num_inference_steps: int | None = None) -> Any:
    """Return a scheduler of Diffusers by name, for the model of another scheduler.

    A warning is logged if only one of the two is for few-step models.

    Args:
        name: one of `SAMPLERS`.
        scheduler: a scheduler of the model, such as `pipe.scheduler`.
        num_inference_steps: the number of steps, if it is known.

    Raises:
        ValueError: the sampler does not exist, does not suit the model, needs more steps, or lacks
            a setting of the noise schedule.
    """
    import diffusers

    config = config_of(scheduler)
    check_sampler(name, config, num_inference_steps)
    kind, sampler = prediction_type_of(config), SAMPLERS[name]
    class_name = _class_name(sampler, kind)
    assert class_name is not None
    made = getattr(diffusers, class_name)
    accepted = inspect.signature(made.__init__).parameters
    if config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in accepted:
        raise FieldValueError(
            "{field} is {name!r}, which lacks the model's noise schedule (rescale_betas_zero_snr); "
            "use another one, such as 'dpm++2m'",
            field=config_field("sampler"),
            name=name,
        )
    _warn_of_few_steps(name, config, class_name)
    if kind == "flow":
        shift = flow_shift_of(config)
        of_model = {
            "num_train_timesteps": config["num_train_timesteps"],
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": shift,
            "shift": shift,
        }
    else:
        of_model = {one: config[one] for one in OF_MODEL if one in config}
    settings = {**of_model, **sampler.settings}
    given = {one: value for one, value in settings.items() if one in accepted}
    result = made(**given)
    levels = of_model.get("original_inference_steps", LCM_LEVELS)
    if levels != LCM_LEVELS:  # kept for the next scheduler that is made from this one
        result.register_to_config(original_inference_steps=levels)
    return result


def _class_name(sampler: Sampler, prediction_type: str) -> str | None:
    """Return the scheduler of a sampler for a prediction type; None if there is none."""
    if prediction_type == "flow":
        return sampler.flow
    return sampler.diffusion if prediction_type in ("epsilon", "v_prediction") else None


def _warn_of_few_steps(name: str, config: Mapping[str, Any], now: str) -> None:
    """Log a warning if only one of model and sampler is for few steps."""
    own_levels = config.get("original_inference_steps", LCM_LEVELS) != LCM_LEVELS
    few = own_levels or config["_class_name"] in FEW_STEP_SCHEDULERS
    chosen = now in FEW_STEP_SCHEDULERS
    if few and not chosen:
        logger.warning(
            "The model is made for few steps with a sampler such as 'lcm'; the sampler %r may give "
            "poor pictures.",
            name,
        )
    if chosen and not few:
        logger.warning(
            "The sampler %r is for few-step models, and this is not one: with few steps, more of "
            "its pictures will be wrong.",
            name,
        )
