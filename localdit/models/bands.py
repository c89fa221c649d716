"""Computing a map in bands, so that little of it is in memory at once."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from .windows import WindowGrid

# Tokens, of all maps of a batch together, that a band has in inference, in float32: enough for
# matrix products at full speed, and few enough for what lies between them to stay small and, on a
# CPU, in its caches. In half precision a band has twice as many.
TOKENS_ON_CPU = 256
TOKENS_ON_GPU = 16384


@functools.cache
def keep_freed_memory() -> None:
    """Have the C library keep what a band frees for the next one.

    glibc returns freed memory to the system beyond twice the largest block that it saw freed, of 32
    MiB at most, and every page that comes back is cleared anew: 4 % of a forward pass in float32.
    So it is shown a block of that size. Elsewhere this does nothing.
    """
    torch.empty(32 * 2**20 - 2**16, dtype=torch.uint8)


def in_bands(
    function: Callable[[slice, WindowGrid], torch.Tensor],
    grid: WindowGrid,
    like: torch.Tensor,
    same_shape: bool = False,
) -> torch.Tensor:
    """Compute what has no part in any token outside of a window, in inference band by band.

    Args:
        function: returns `(B, tokens in the band, channels)` for the tokens of a band and the band
            as a map of its own; see `WindowGrid.bands`.
        grid: the map and its windows.
        like: `(B, N, ...)`, has the batch size and device.
        same_shape: whether the result is like it in all. Room for it is then made before anything
            is computed, and taken where the map before the last one was: smaller things would
            settle there.

    Returns:
        `(B, N, channels)`.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(slice(None), grid)
    on_cpu = like.device.type == "cpu"
    if on_cpu:
        keep_freed_memory()
    at_once = (TOKENS_ON_CPU if on_cpu else TOKENS_ON_GPU) * 4 // like.element_size()
    bands = grid.bands(at_once // like.shape[0])
    if len(bands) == 1:
        return function(*bands[0])
    out = torch.empty_like(like) if same_shape else None
    for tokens, band in bands:
        part = function(tokens, band)
        if out is None:
            out = part.new_empty(*like.shape[:2], part.shape[2])
        out[:, tokens] = part
    assert out is not None
    return out
