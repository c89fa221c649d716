"""The settings of one picture, and what the page shows at first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..config import Config, with_settings
from ..errors import FieldError, Vocabulary

if TYPE_CHECKING:
    from PIL import Image

Mode = Literal["generate", "edit", "inpaint"]
MAX_SEED = 2**53 - 1  # the largest integer up to which browsers are exact

# The page's names of fields, which are the labels of its controls.
PAGE = Vocabulary(
    {
        "num_inference_steps": "Steps",
        "strength": "Strength",
        "guidance_scale": "Guidance",
        "height": "Height",
        "width": "Width",
    },
    advice="set {name} to {value}",
)


@dataclass(frozen=True)
class Settings:
    """The settings of one picture, without the pictures that are uploaded.

    Attributes:
        mode: the task.
        prompt: what the picture shows.
        negative_prompt: what it should not show.
        seed: at least 0.
        num_inference_steps: number of denoising steps.
        guidance_scale: weight of the prompt; 1 or less turns guidance off.
        height, width: pixels.
        strength: how much to change, in [0, 1]; "generate" does not use it.
    """

    mode: Mode
    prompt: str
    negative_prompt: str
    seed: int
    num_inference_steps: int
    guidance_scale: float
    height: int
    width: int
    strength: float

    def configure(self, config: Config) -> Config:
        """Return a Config that draws this picture with the model of `config`.

        Raises:
            ValueError: the settings cannot work; the message uses the labels of the page.
        """
        if not self.prompt.strip():
            raise ValueError("The prompt is empty: say what the picture shows.")
        if self.seed is None or not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"The seed must be a whole number from 0 to {MAX_SEED}.")
        names = ("num_inference_steps", "strength", "guidance_scale", "height", "width")
        try:
            return with_settings(config, {name: getattr(self, name) for name in names})
        except FieldError as error:
            raise ValueError(error.worded(PAGE)) from error


@dataclass(frozen=True)
class Offer:
    """What the page shows at first, and its limits.

    Attributes:
        config: the first settings.
        negative_prompt: the first negative prompt.
        prompts: examples; the first is in the page.
        strength: the first strength of each mode that has one.
        picture: a picture to try "edit" and "inpaint" with.
        multiple: pixels per token; heights and widths are multiples of it.
    """

    config: Config
    negative_prompt: str
    prompts: Sequence[str]
    strength: Mapping[str, float]
    picture: Image.Image | None
    multiple: int

    @property
    def sides(self) -> tuple[int, int, int]:
        """The shortest and the longest side of a picture, and the step between sides, in pixels."""
        longest = 2 * max(self.config.height, self.config.width)
        return self.multiple, longest, self.multiple
