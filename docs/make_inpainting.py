"""Draws images/inpaint.png with the model in the box: `python docs/make_inpainting.py`."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw

from localdit import LocalDiTInpaintPipeline, LocalDiTPipeline, model_in_the_box
from localdit.images import image_grid

CIRCLE = "a large red circle on the left on a white background"
BOTH = "a large red circle to the left of a small green triangle on a white background"


def main() -> None:
    """Draw a picture, and paint something more into it."""
    pipe = LocalDiTPipeline.from_pretrained(model_in_the_box())
    inpaint = LocalDiTInpaintPipeline.from_pipe(pipe)
    settings = {"guidance_scale": 2.0}
    picture = pipe(CIRCLE, generator=torch.Generator().manual_seed(0), **settings).images[0]
    mask = Image.new("L", picture.size, "black")
    ImageDraw.Draw(mask).rectangle((72, 24, 127, 103), fill="white")
    generator = torch.Generator().manual_seed(0)
    result = inpaint(BOTH, picture, mask, generator=generator, **settings).images[0]
    row = image_grid([picture, mask.convert("RGB"), result], columns=3)
    row.save(Path(__file__).with_name("images") / "inpaint.png")


if __name__ == "__main__":
    main()
