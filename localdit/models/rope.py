"""Rotary position embeddings over two axes."""

from __future__ import annotations

import torch


def rope_angles(
    height: int, width: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Angles for a row-major map of `height x width` tokens, `(height * width, head_dim / 2)`.

    The first half of a token's angles turn with its column, the second half with its row, at
    frequencies `10000 ** (-4 j / head_dim)` for `j = 0 .. head_dim / 4 - 1` (RoFormer, section
    3.4.2, applied to each axis).
    """
    exponents = torch.arange(0, head_dim, 4, device=device, dtype=dtype) / head_dim
    frequencies = 10000.0**-exponents  # (head_dim / 4,)
    x = torch.arange(width, device=device, dtype=dtype)[:, None] * frequencies
    y = torch.arange(height, device=device, dtype=dtype)[:, None] * frequencies
    grid = (height, width, len(frequencies))
    angles = torch.cat([x[None].expand(grid), y[:, None].expand(grid)], dim=-1)
    return angles.flatten(0, 1)


def apply_rope(hidden_states: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Turn neighbouring channels by an angle: `(a, b) -> (a cos - b sin, b cos + a sin)`.

    Args:
        hidden_states: `(..., tokens, heads, head_dim)`.
        angles: `(tokens, head_dim / 2)`, in the dtype to compute in.

    Returns:
        The shape of `hidden_states`, in its dtype.
    """
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]  # (tokens, 1, head_dim / 2)
    a, b = hidden_states.to(angles.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return turned.flatten(-2).to(hidden_states.dtype)
