"""What one picture of the page is made from, and what the page offers at first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from ..config import PIXEL_MULTIPLE, Config

if TYPE_CHECKING:
    from PIL import Image

Mode = Literal["generate", "edit", "inpaint"]
MAX_SEED = 2**53 - 1  # the largest whole number that browsers hold exactly

# What messages call the fields of a Config: the labels in the page.
LABELS = {
    "denoising_steps": "Steps",
    "denoising_strength": "Strength",
    "guidance_scale": "Guidance",
    "height": "Height",
    "width": "Width",
}


@dataclass(frozen=True)
class Settings:
    """What is asked for, beside the pictures that are put in.

    Attributes:
        mode: what is drawn from.
        prompt: what the picture is to show.
        negative_prompt: what to steer away from.
        seed: at least 0.
        steps: of denoising.
        guidance_scale: weight of the prompt; at 1 or less, no guidance.
        height: pixels.
        width: pixels.
        strength: how much to change, in [0, 1]; "generate" does without.
    """

    mode: Mode
    prompt: str
    negative_prompt: str
    seed: int
    steps: int
    guidance_scale: float
    height: int
    width: int
    strength: float

    def configure(self, config: Config) -> Config:
        """The `Config` that draws this with the model of another one.

        Raises:
            ValueError: for what can't be drawn; the message speaks of what stands in the page.
        """
        if not self.prompt.strip():
            raise ValueError("The prompt is empty: say what the picture is to show.")
        if self.seed is None or not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"The seed must be a whole number from 0 to {MAX_SEED}.")
        try:
            return replace(
                config,
                denoising_steps=self.steps,
                denoising_strength=self.strength,
                guidance_scale=self.guidance_scale,
                height=self.height,
                width=self.width,
            )
        except (TypeError, ValueError) as error:
            message = str(error)
            for name, label in LABELS.items():
                message = message.replace(f"Config.{name}", label)
            raise ValueError(message) from error


@dataclass(frozen=True)
class Offer:
    """What stands in the page at first.

    Attributes:
        config: the settings to begin with.
        negative_prompt: likewise.
        prompts: examples; the first stands in the page.
        strength: for each mode that has one.
        picture: to try "edit" and "inpaint" with.
    """

    config: Config
    negative_prompt: str
    prompts: Sequence[str]
    strength: Mapping[str, float]
    picture: Image.Image | None

    @property
    def sides(self) -> tuple[int, int, int]:
        """The shortest and the longest side of a picture, and the step between two; in pixels."""
        return PIXEL_MULTIPLE, 2 * max(self.config.height, self.config.width), PIXEL_MULTIPLE
