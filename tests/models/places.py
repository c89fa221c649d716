"""The places of the Triton kernels' tiles on a map, as the kernels compute them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from localdit.models.window_attention_kernels import place
from localdit.models.windows import WindowGrid


@triton.jit
def store_places(
    tokens, regions, height, width, row_shift, column_shift,
    WINDOW: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    token, region, _ = place(tile, height, width, row_shift, column_shift, WINDOW, SLOTS)
    at = tile * SLOTS + tl.arange(0, SLOTS)
    tl.store(tokens + at, token)
    tl.store(regions + at, region)


def places(grid: WindowGrid, slots: int, tiles: int) -> torch.Tensor:
    """Token and region of each slot, `(2, tiles, slots)`."""
    tokens, regions = out = torch.full((2, tiles, slots), -7, dtype=torch.int32)
    height, width, window, *shifts = grid
    store_places[(tiles,)](tokens, regions, height, width, *shifts, WINDOW=window, SLOTS=slots)
    return out
