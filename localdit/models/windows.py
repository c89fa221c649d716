"""Shifted windows as address arithmetic: which token sits where, and who may see whom."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


class WindowLayout(NamedTuple):
    """Where the tokens of one `height x width` map go when it is cut into shifted windows.

    Attributes:
        order: `(num_windows * window_size**2,)` int64. Token (row-major index) that each window
            slot reads. Padding slots read a neighbouring token and are masked by `hidden`.
        inverse: `(height * width,)` int64. Slot in which each token sits.
        hidden: `(num_windows, window_size**2, window_size**2)` bool, True where query i must not
            see key j; None where every pair of every window may see each other.
    """

    order: torch.Tensor
    inverse: torch.Tensor
    hidden: torch.Tensor | None


def padded(size: int, window_size: int) -> int:
    """The smallest multiple of `window_size` that holds `size` tokens."""
    return -(-size // window_size) * window_size


@functools.lru_cache(maxsize=256)
def window_layout(
    height: int, width: int, window_size: int, shift_size: int, device: torch.device
) -> WindowLayout:
    """Lay a map of `height x width` tokens out in windows, padded right and below, then rolled.

    The map is padded to a multiple of the window, rolled by `-shift_size` in both directions and
    cut (Swin Transformer, section 3.2: the cyclic shift and its mask). Tokens that the roll brought
    together from opposite edges do not see each other, and nothing sees the padding.

    Args:
        height, width: size of the map in tokens, at least 1.
        window_size: side of a window in tokens.
        shift_size: how far the map is rolled, `0 <= shift_size < window_size`.
        device: where the index tensors live.
    """
    # Cached tensors outlive the call: made inside inference mode, no later training could use them.
    with torch.inference_mode(False):
        rows = _shifted_positions(height, window_size, shift_size, device)
        columns = _shifted_positions(width, window_size, shift_size, device)

        y, x = torch.meshgrid(rows, columns, indexing="ij")
        order = _cut(y.clamp(max=height - 1) * width + x.clamp(max=width - 1), window_size)
        is_token = _cut((y < height) & (x < width), window_size)

        w = window_size
        slots = torch.arange(order.numel(), device=device)
        slots = slots.view(len(rows) // w, len(columns) // w, w, w).transpose(1, 2)
        slots = slots.reshape(len(rows), len(columns)).roll((shift_size, shift_size), dims=(0, 1))
        inverse = slots[:height, :width]

        hidden = None
        if shift_size > 0 or (height, width) != (len(rows), len(columns)):
            # Rows below the seam of the roll came from the top edge; columns likewise; padding is
            # its own.
            wrapped_rows = torch.arange(len(rows), device=device) >= len(rows) - shift_size
            wrapped_columns = torch.arange(len(columns), device=device) >= len(columns) - shift_size
            region = 2 * wrapped_rows[:, None].long() + wrapped_columns[None, :].long()
            region = _cut(region, window_size).masked_fill(~is_token, -1)
            hidden = region[:, :, None] != region[:, None, :]

        return WindowLayout(order.flatten(), inverse.flatten(), hidden)


def _shifted_positions(
    size: int, window_size: int, shift_size: int, device: torch.device
) -> torch.Tensor:
    """Positions along one axis after padding and rolling, `(padded size,)`."""
    return torch.arange(padded(size, window_size), device=device).roll(-shift_size)


def _cut(grid: torch.Tensor, window_size: int) -> torch.Tensor:
    """`(rows, columns)` -> `(num_windows, window_size**2)`."""
    rows, columns = grid.shape
    w = window_size
    windows = grid.view(rows // w, w, columns // w, w).transpose(1, 2)
    return windows.reshape(-1, w * w)


@functools.lru_cache(maxsize=32)
def relative_position_index(window_size: int, device: torch.device) -> torch.Tensor:
    """Row of the relative position table for each pair of slots, `(w**2, w**2)`.

    For query i and key j at offset (dy, dx) = position of i minus position of j, the row is
    `(dy + w - 1) * (2 w - 1) + (dx + w - 1)` (Swin Transformer, section 3.2).
    """
    w = window_size
    with torch.inference_mode(False):
        slot = torch.arange(w * w, device=device)
        dy = slot[:, None] // w - slot[None, :] // w
        dx = slot[:, None] % w - slot[None, :] % w
        return (dy + w - 1) * (2 * w - 1) + (dx + w - 1)


def shift_sizes(num_layers: int, window_size: int, schedule: str) -> list[int]:
    """How far each layer rolls its map.

    Args:
        schedule: "cyclic" gives `layer index mod window_size` (the released model); "alternating"
            gives `0, window_size // 2, 0, ...` (Swin Transformer).

    Raises:
        ValueError: for another schedule.
    """
    if schedule == "cyclic":
        return [layer % window_size for layer in range(num_layers)]
    if schedule == "alternating":
        return [(layer % 2) * (window_size // 2) for layer in range(num_layers)]
    raise ValueError(
        f"`shift_schedule` is {schedule!r}; choose 'cyclic' (layer index mod window size) "
        "or 'alternating' (0, window size / 2, ...)."
    )
