"""LocalDiT: text to image with a diffusion transformer that attends within small windows.

The public interface is the command line and the names in `__all__` here and in `checkpoint`,
`config`, `images`, `inference`, `models`, `pipelines`, `scenes` and `utils`; docs/reference lists
them. Everything else may change without notice.

The names below are imported on first use, which keeps `import localdit` cheap. Diffusers' own
classes, such as `DiffusionPipeline` and `AutoPipelineForInpainting`, know them too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .registration import lazy_names, register
from .version import __version__ as __version__

if TYPE_CHECKING:
    from .config import Config
    from .models import LocalDiTTransformer2DModel
    from .pipelines import LocalDiTImg2ImgPipeline, LocalDiTInpaintPipeline, LocalDiTPipeline
    from .utils import load_model, model_in_the_box

_HOMES = {
    "Config": "config",
    "LocalDiTImg2ImgPipeline": "pipelines",
    "LocalDiTInpaintPipeline": "pipelines",
    "LocalDiTPipeline": "pipelines",
    "LocalDiTTransformer2DModel": "models",
    "load_model": "utils",
    "model_in_the_box": "utils",
}

__all__ = [
    "Config",
    "LocalDiTImg2ImgPipeline",
    "LocalDiTInpaintPipeline",
    "LocalDiTPipeline",
    "LocalDiTTransformer2DModel",
    "load_model",
    "model_in_the_box",
]

__getattr__ = lazy_names(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register()
