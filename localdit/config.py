"""`Config`: the model's sizes and the settings of inference and training in one place.

The class only describes. It loads nothing and imports neither PyTorch nor Diffusers, so that the
command line reads its defaults at no cost.
"""

import difflib
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from .errors import Field, FieldTypeError, FieldValueError

__all__ = ["Config"]

INDEX = "model_index.json"  # of the folder of a pipeline

LARGEST_WEIGHT = 1_000_000  # of a prompt or a LoRA; far larger ones overflow

# Standard names of the settings that `Config` has always called otherwise.
STANDARD_NAMES = {"denoising_steps": "num_inference_steps", "denoising_strength": "strength"}
OWN_NAMES = {standard: own for own, standard in STANDARD_NAMES.items()}


class Default(str):
    """The name of a repository on the hub that is the default of a field of `Config`.

    An equal string that a user gives is not a `Default`.
    """


def _ranged(
    default: Any,
    minimum: float,
    maximum: float = math.inf,
    *,
    above: bool = False,
    below: bool = False,
) -> Any:
    """Declare a number in [minimum, maximum]; `above` and `below` exclude that end."""
    return field(default=default, metadata={"range": (minimum, maximum, above, below)})


@dataclass(kw_only=True)
class Config:
    """The model's architecture and the settings of inference and training.

    Every value is checked when the object is constructed and whenever a field is assigned. A
    derived class may change defaults and add fields; the types and ranges of the fields below stay.

    Raises:
        TypeError: for an unknown name (the message names the closest field) or a value of the wrong
            type.
        ValueError: for a value outside its range.
    """

    # Architecture of the transformer
    num_attention_heads: int = _ranged(16, 1)
    attention_head_dim: int = _ranged(72, 1)
    num_layers: int = _ranged(18, 1)
    patch_size: int = _ranged(2, 1)
    window_size: int = _ranged(4, 1)  # tokens along a side of a window
    in_channels: int = _ranged(4, 1)
    out_channels: int = _ranged(4, 1)
    cross_attention_dim: int = _ranged(1152, 1)  # heads x head dim
    caption_channels: int = _ranged(4096, 1)  # width of the text encoder
    num_embeds_ada_norm: int = _ranged(1000, 1)
    norm_type: Literal["ada_norm_single"] = "ada_norm_single"
    do_rope: bool = True
    use_global: bool = False  # global context beside the windows
    shift_schedule: Literal["cyclic", "alternating"] = "cyclic"
    sample_size: int = _ranged(128, 1)  # latents along a side of the native size
    eps: float = _ranged(1e-10, 0, 1, above=True)  # of the RMSNorms of queries and keys
    dropout: float = _ranged(0.0, 0, 1, below=True)

    # Inference
    max_length: int = _ranged(120, 1)  # text tokens
    height: int = _ranged(768, 1)  # pixels; a multiple of the model's pixels per token
    width: int = _ranged(1024, 1)  # pixels
    denoising_steps: int = _ranged(20, 1, 1000)
    denoising_strength: float = _ranged(0.8, 0, 1)  # 0 keeps the given image, 1 ignores it
    guidance_scale: float = _ranged(7.0, 0, LARGEST_WEIGHT)  # 1 or less: no guidance
    batch_size: int = _ranged(1, 1)  # pictures per pass; in training, samples per process

    # Where `localdit.utils.load_model` finds the parts: local paths or hub names
    ckpt_path: str | Path = "output/LocalDiT-1024.pt"
    text_encoder: str | Path = field(default=Default("google/flan-t5-xxl"))  # with its tokenizer
    vae: str | Path = field(default=Default("PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers"))
    scheduler: str | Path = field(default=Default("PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers"))
    sampler: str | None = None  # a name of `localdit.core.samplers`; None samples with `scheduler`
    offload: Literal["model", "sequential"] | None = None  # idle parts stay in CPU memory
    text_encoder_quantization: Literal["8bit", "4bit"] | None = None  # needs bitsandbytes

    # Training
    num_workers: int = _ranged(32, 0)
    train_sampling_steps: int = _ranged(1000, 1)
    save_checkpoint_interval: int = _ranged(20_000, 1)  # steps
    validation_interval: int = _ranged(1_000, 1)  # steps
    learning_rate: float = _ranged(5e-5, 0, above=True)
    weight_decay: float = _ranged(3e-2, 0)
    gradient_clip: float = _ranged(0.01, 0, above=True)  # largest norm of the gradient
    max_datasteps: int = _ranged(500_000, 1)
    token_dropout: float = _ranged(0.15, 0, 1)
    ema_beta: float = _ranged(0.9999, 0, 1, below=True)
    ema_step: int = _ranged(450_000, 0)

    def __new__(cls, *args: Any, **values: Any) -> "Config":
        """Refuse unknown names before the generated `__init__` sees them."""
        for name in values:
            if name not in cls.__dataclass_fields__:
                raise TypeError(_unknown(cls, name))
        return super().__new__(cls)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field, having checked its type and range."""
        if name not in self.__dataclass_fields__:
            raise TypeError(_unknown(type(self), name))
        if declared := Config.__dataclass_fields__.get(name):
            _check_type(name, value, _options(declared.type))
            _check_range(name, value, declared.metadata)
        super().__setattr__(name, value)

    def __post_init__(self) -> None:
        """Check the fields that depend on one another."""
        inner = self.num_attention_heads * self.attention_head_dim
        if self.cross_attention_dim != inner:
            raise FieldValueError(
                "{field} is {value}; expected num_attention_heads x attention_head_dim = {product}",
                field=config_field("cross_attention_dim"),
                value=self.cross_attention_dim,
                product=f"{self.num_attention_heads} x {self.attention_head_dim} = {inner}",
            )
        if self.do_rope and self.attention_head_dim % 4:
            raise FieldValueError(
                "{field} is {value}; expected a multiple of 4, which 2D RoPE needs (or "
                "do_rope=False)",
                field=config_field("attention_head_dim"),
                value=self.attention_head_dim,
            )

    def transformer_kwargs(self) -> dict[str, Any]:
        """Return the architecture as keyword arguments of `LocalDiTTransformer2DModel`."""
        names = list(Config.__dataclass_fields__)
        values = {name: getattr(self, name) for name in names[: names.index("eps")]}
        return values | {"qk_norm_eps": self.eps, "dropout": self.dropout}


def part_source(config: Config, name: str, checkpoint: Path) -> str | Path:
    """Return the folder of a part of a model, or its repository on the hub.

    A pipeline's folder has all parts. `config` replaces a part if it names another one than its
    class does by default, or the same one because a user gave it. For other checkpoints, `config`
    names all parts.

    Args:
        name: "text_encoder", "vae" or "scheduler".
        checkpoint: `config.ckpt_path`, or the folder of a pipeline that is named otherwise.
    """
    named, default = getattr(config, name), getattr(type(config), name)
    given = named != default or type(named) is not type(default)
    return named if given or not (checkpoint / INDEX).is_file() else checkpoint


def config_field(name: str) -> Field:
    """Return a field of `Config` for a message, under its standard name."""
    return Field(STANDARD_NAMES.get(name, name), f"Config.{name}")


def inference_settings(config: Config) -> dict[str, Any]:
    """Return the settings of drawing by their standard names, as the pipelines take them."""
    own = ("height", "width", "denoising_steps", "denoising_strength", "guidance_scale")
    return {STANDARD_NAMES.get(name, name): getattr(config, name) for name in own}


def with_settings(config: Config, settings: Mapping[str, Any]) -> Config:
    """Return a copy of `config` with other settings, given by their standard names."""
    return replace(config, **{OWN_NAMES.get(name, name): settings[name] for name in settings})


def is_finite_number(value: Any) -> bool:
    """Return whether a value is a number, finite as a float; whole numbers can be too large."""
    try:
        return isinstance(value, Real) and math.isfinite(value)
    except OverflowError:
        return False


def _options(hint: Any) -> list[Any]:
    """Return the types and literal values that a type hint allows."""
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [option for part in get_args(hint) for option in _options(part)] or [hint]


def _unknown(cls: type[Config], name: str) -> str:
    known = list(cls.__dataclass_fields__)
    closest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
    return f"Config has no field {name!r}; the closest is {closest!r}"


def _check_type(name: str, value: Any, options: list[Any]) -> None:
    """Raise TypeError, or ValueError if the field is a choice between literal values."""
    types = tuple(option for option in options if isinstance(option, type))
    choices = [option for option in options if option not in types]
    if choices:
        if value not in choices and not isinstance(value, types):
            allowed = " or ".join(map(repr, choices)) + (" or None" if NoneType in types else "")
            raise FieldValueError(
                "{field} is {value!r}; expected {allowed}",
                field=config_field(name),
                value=value,
                allowed=allowed,
            )
        return
    accepted = (*types, int) if float in types else types
    if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in types):
        raise FieldTypeError(
            "{field} is {value!r} of type {given}; expected {wanted}",
            field=config_field(name),
            value=value,
            given=type(value).__name__,
            wanted=" or ".join(t.__name__ for t in types),
        )


def _check_range(name: str, value: Any, metadata: Mapping[str, Any]) -> None:
    if "range" not in metadata:
        return
    minimum, maximum, above, below = metadata["range"]
    inside = (value > minimum if above else value >= minimum) and (
        value < maximum if below else value <= maximum
    )
    if not (inside and is_finite_number(value)):
        lower = f"more than {minimum}" if above else f"at least {minimum}"
        upper = f"less than {maximum}" if below else f"at most {maximum}"
        limits = f"{lower} and finite" if maximum == math.inf else f"{lower} and {upper}"
        raise FieldValueError(
            "{field} is {value}; expected {limits}",
            field=config_field(name),
            value=reprlib.repr(value),
            limits=limits,
        )
