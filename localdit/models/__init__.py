"""The transformer and its attention.

Hidden state: index tensors, tables and checks of a device are cached for the life of the process,
a bounded number of each. The docstrings of `windows`, `layers`, `window_attention`,
`window_attention_triton` and `backends` name them, and `clear_caches` clears them.
`diffusers_hooks` and `window_attention_triton` register classes and operators when imported.
"""

from . import backends, layers, window_attention, window_attention_triton, windows
from .attention import (
    FullAttnProcessor,
    LocalAttnProcessor,
    LocalDiTAttention,
    LocalGlobalAttnProcessor,
    LocalPooledAttnProcessor,
)
from .configuration import PRESETS
from .transformer import LocalDiTTransformer2DModel

__all__ = [
    "PRESETS",
    "FullAttnProcessor",
    "LocalAttnProcessor",
    "LocalDiTAttention",
    "LocalDiTTransformer2DModel",
    "LocalGlobalAttnProcessor",
    "LocalPooledAttnProcessor",
    "clear_caches",
]

_CACHES = (
    backends.why_not_trusted,
    backends._triton_version,
    backends._why_not_on_gpu,
    layers.rope_angles,
    window_attention._head_rows,
    window_attention_triton._rotation,
    windows.relative_position_index,
    windows.window_layout,
)


def clear_caches() -> None:
    """Clear all cached tensors and checks of devices; the next call makes them again.

    This frees the memory of maps whose sizes are not needed any more, at most 256 sizes.
    """
    for cache in _CACHES:
        cache.cache_clear()
