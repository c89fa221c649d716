"""The pipelines: from a prompt, with an image or an image and a mask, to a picture.

The names below are imported when they are first used, so that the prompt helpers stay cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..registration import lazy_names

if TYPE_CHECKING:
    from .image_to_image import LocalDiTImg2ImgPipeline
    from .inpainting import LocalDiTInpaintPipeline
    from .text_to_image import LocalDiTPipeline

_HOMES = {
    "LocalDiTImg2ImgPipeline": "image_to_image",
    "LocalDiTInpaintPipeline": "inpainting",
    "LocalDiTPipeline": "text_to_image",
}

__all__ = ["LocalDiTImg2ImgPipeline", "LocalDiTInpaintPipeline", "LocalDiTPipeline"]

__getattr__ = lazy_names(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
