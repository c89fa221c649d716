"""The steps, the guidance and the words that suit a model, as its pipeline folder names them.

Nothing heavy is imported here, so that commands read a folder at no cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..config import Config, with_settings
from ..errors import FieldError, FieldTypeError, Vocabulary
from ..files import read_json

INDEX = "model_index.json"
MOST_FEW_STEPS = 8


@dataclass(frozen=True)
class SamplingSettings:
    """The settings that suit a model, where a call gives none.

    Attributes:
        num_inference_steps: number of denoising steps.
        guidance_scale: weight of the prompt; 1 or less means no guidance.

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range, as in `Config`.
    """

    num_inference_steps: int = Config.denoising_steps
    guidance_scale: float = Config.guidance_scale

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

    Raises:
        TypeError, ValueError: the index is damaged, or names an unusable value.
    """
    index = folder / INDEX
    if not index.is_file():
        return SamplingSettings()
    try:
        return SamplingSettings.of(read_json(index))
    except FieldError as error:
        raise type(error)(f"{index}: {error}") from None


def read_whole_words(folder: Path) -> bool | None:
    """Return `whole_words` of the folder of a pipeline; None if it says nothing.

    Raises:
        TypeError, ValueError: the index is damaged, or names an unusable value.
    """
    index = folder / INDEX
    value = read_json(index).get("whole_words") if index.is_file() else None
    if not isinstance(value, bool | None):
        raise FieldTypeError(f"{index}: whole_words is {value!r}; expected true or false.")
    return value
