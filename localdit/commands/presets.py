"""What suits a model where the command does not say it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """Prompts for a bare script, and settings."""

    t2i: list[str]
    i2i: list[str]
    negative_prompt: str
    config: dict[str, Any]  # what differs from the Config


PHOTOGRAPHS = Preset(
    t2i=[
        "a photo of a wooden boat on a calm mountain lake at sunrise, mist over the water",
        "a close-up photo of a red fox in fresh snow, soft winter light, highly detailed",
        "a street of old stone houses after the rain, warm lamps, evening, wide angle",
    ],
    i2i=["an oil painting of a boat on a lake, thick brush strokes, warm colours"],
    negative_prompt="bad quality, worst quality, low resolution, blurry",
    config={},
)
SCENES = Preset(
    t2i=[
        "a large red circle at the top left on a blue background",
        "a small yellow square at the bottom right on a green background",
        "a large white triangle in the centre on a purple background",
        "a small blue circle to the left of a large red square on a white background",
    ],
    i2i=["a large green circle at the top left on a yellow background"],
    negative_prompt="",
    config={"guidance_scale": 2.0},
)
