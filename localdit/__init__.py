"""LocalDiT: pictures from text with a diffusion transformer whose attention looks at small windows.

The names below are imported when they are first used, so that `import localdit` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .config import Config
    from .models import LocalDiTTransformer2DModel
    from .pipelines import LocalDiTImg2ImgPipeline, LocalDiTPipeline
    from .utils import load_model

_HOMES = {
    "Config": "config",
    "LocalDiTImg2ImgPipeline": "pipelines",
    "LocalDiTPipeline": "pipelines",
    "LocalDiTTransformer2DModel": "models",
    "load_model": "utils",
}

__all__ = [
    "Config",
    "LocalDiTImg2ImgPipeline",
    "LocalDiTPipeline",
    "LocalDiTTransformer2DModel",
    "load_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
