"""Generate the guides' images with the model in the box: `python docs/make_pictures.py`."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw

from localdit import (
    LocalDiTImg2ImgPipeline,
    LocalDiTInpaintPipeline,
    LocalDiTPipeline,
    model_in_the_box,
)
from localdit.images import image_grid

IMAGES = Path(__file__).with_name("images")
STRENGTHS = (0.2, 0.4, 0.6, 0.8, 1.0)
CIRCLE = "a large red circle at the top left on a blue background"
CHANGED = "a large green circle at the top left on a yellow background"
ON_THE_LEFT = "a large red circle on the left on a white background"
BOTH = "a large red circle to the left of a small green triangle on a white background"
SETTINGS = {"guidance_scale": 2.0}


def main() -> None:
    """Generate circle.png, strengths.png and inpaint.png."""
    pipe = LocalDiTPipeline.from_pretrained(model_in_the_box())
    draw_strengths(pipe)
    draw_inpainting(pipe)


def first_seed() -> torch.Generator:
    """Return a generator with seed 0."""
    return torch.Generator().manual_seed(0)


def draw_strengths(pipe: LocalDiTPipeline) -> None:
    """Generate an image, and change it with growing strength."""
    edit = LocalDiTImg2ImgPipeline.from_pipe(pipe)
    circle = pipe(CIRCLE, generator=first_seed(), **SETTINGS).images[0]
    circle.save(IMAGES / "circle.png")
    row = [circle]
    for strength in STRENGTHS:
        changed = edit(CHANGED, circle, strength=strength, generator=first_seed(), **SETTINGS)
        row += changed.images
    image_grid(row, columns=len(row)).save(IMAGES / "strengths.png")


def draw_inpainting(pipe: LocalDiTPipeline) -> None:
    """Generate an image, and inpaint another object."""
    inpaint = LocalDiTInpaintPipeline.from_pipe(pipe)
    picture = pipe(ON_THE_LEFT, generator=first_seed(), **SETTINGS).images[0]
    mask = Image.new("L", picture.size, "black")
    ImageDraw.Draw(mask).rectangle((144, 48, 255, 207), fill="white")
    result = inpaint(BOTH, picture, mask, generator=first_seed(), **SETTINGS).images[0]
    row = [picture, mask.convert("RGB"), result]
    image_grid(row, columns=len(row)).save(IMAGES / "inpaint.png")


if __name__ == "__main__":
    main()
