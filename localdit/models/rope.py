"""Rotary position embeddings over two axes."""

from __future__ import annotations

import functools

import torch


@functools.lru_cache(maxsize=32)
def rope_angles(
    height: int, width: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Angles for a row-major map of `height x width` tokens, `(height * width, head_dim / 2)`.

    The first half of a token's angles turn with its column, the second half with its row, at
    frequencies `10000 ** (-4 j / head_dim)` for `j = 0 .. head_dim / 4 - 1` (RoFormer, section
    3.4.2, applied to each axis).
    """
    # Cached tensors outlive the call: made inside inference mode, no later training could use them.
    with torch.inference_mode(False):
        exponents = torch.arange(0, head_dim, 4, device=device, dtype=dtype) / head_dim
        frequencies = 10000.0**-exponents  # (head_dim / 4,)
        x = torch.arange(width, device=device, dtype=dtype)[:, None] * frequencies
        y = torch.arange(height, device=device, dtype=dtype)[:, None] * frequencies
        grid = (height, width, len(frequencies))
        return torch.cat([x[None].expand(grid), y[:, None].expand(grid)], dim=-1).flatten(0, 1)


def apply_rope(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Turn neighbouring channels by an angle: `(a, b) -> (a cos - b sin, b cos + a sin)`.

    Args:
        x: `(..., head_dim)`, in the dtype to compute in.
        angles: broadcast against `(..., head_dim / 2)`, in the same dtype.

    Returns:
        The shape of `x`.
    """
    pairs = x.unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # the compiler fuses this, but not complex numbers
        (a, b), cos, sin = pairs.unbind(-1), angles.cos(), angles.sin()
        return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    # The same as a product of complex numbers: one pass over memory, a tenth of the time.
    turn = torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(torch.view_as_complex(pairs) * turn).flatten(-2)
