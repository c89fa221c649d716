"""Draws circle.png and strengths.png with the model in the box: `python docs/make_pictures.py`."""

from __future__ import annotations

from pathlib import Path

import torch

from localdit import LocalDiTImg2ImgPipeline, LocalDiTPipeline
from localdit.images import image_grid
from localdit.utils import model_in_the_box

IMAGES = Path(__file__).with_name("images")
STRENGTHS = (0.2, 0.4, 0.6, 0.8, 1.0)
CIRCLE = "a large red circle at the top left on a blue background"
CHANGED = "a large green circle at the top left on a yellow background"


def main() -> None:
    """Draw a picture, and change it more and more."""
    pipe = LocalDiTPipeline.from_pretrained(model_in_the_box())
    edit = LocalDiTImg2ImgPipeline.from_pipe(pipe)
    settings = {"guidance_scale": 2.0}
    circle = pipe(CIRCLE, generator=torch.Generator().manual_seed(0), **settings).images[0]
    circle.save(IMAGES / "circle.png")
    row = [circle]
    for strength in STRENGTHS:
        generator = torch.Generator().manual_seed(0)
        changed = edit(CHANGED, circle, strength=strength, generator=generator, **settings)
        row += changed.images
    image_grid(row, columns=len(row)).save(IMAGES / "strengths.png")


if __name__ == "__main__":
    main()
