"""The pipelines: from a prompt, or a prompt and an image, to a picture.

The names below are imported when they are first used, so that the prompt helpers stay cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .image_to_image import LocalDiTImg2ImgPipeline
    from .text_to_image import LocalDiTPipeline

_HOMES = {
    "LocalDiTImg2ImgPipeline": "image_to_image",
    "LocalDiTPipeline": "text_to_image",
}

__all__ = ["LocalDiTImg2ImgPipeline", "LocalDiTPipeline"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
