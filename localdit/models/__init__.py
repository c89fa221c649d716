"""The transformer and its attention."""

from .attention import (
    FullAttnProcessor,
    LocalAttnProcessor,
    LocalDiTAttention,
    LocalGlobalAttnProcessor,
)
from .presets import PRESETS
from .transformer import LocalDiTTransformer2DModel

__all__ = [
    "PRESETS",
    "FullAttnProcessor",
    "LocalAttnProcessor",
    "LocalDiTAttention",
    "LocalDiTTransformer2DModel",
    "LocalGlobalAttnProcessor",
]
