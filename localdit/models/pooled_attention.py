"""Attention to the tokens of a window and to averages of the whole map, in one softmax."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .layers import compute_dtype
from .window_attention import window_bias
from .windows import WindowGrid, window_layout


class Tiles(NamedTuple):
    """Averages of a map over tiles of `window_size x window_size` tokens.

    Tiles start in the map's first corner in every layer, whatever the shift of the windows. Those
    at the right and lower edges hold the tokens that are left.

    Attributes:
        key, value: `(B, M, C)`, averages of the tokens' keys, normed and rotated, and values.
        bias: `(M,)`, the logarithm of the share of its `window_size**2` tokens that a tile has.
    """

    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor


def pool_tiles(key: torch.Tensor, value: torch.Tensor, grid: WindowGrid) -> Tiles:
    """Average keys and values of a map over its tiles.

    Keys are averaged after their rotation. So a query's logit for a tile is the mean of its logits
    for the tokens of the tile, and depends on relative positions as they do. Of equal keys, the
    average is their rotation to the tile's centre, weaker at frequencies that turn within a tile.

    Args:
        key, value: `(B, N, C)`, keys normed and rotated by their position on the map.
        grid: the map of N tokens. It has `M = rows * columns` tiles.
    """

    def averages(x: torch.Tensor) -> torch.Tensor:
        image = x.to(compute_dtype(x)).unflatten(1, (grid.height, grid.width)).permute(0, 3, 1, 2)
        tiles = F.avg_pool2d(image, grid.window_size, ceil_mode=True, count_include_pad=False)
        return tiles.flatten(2).transpose(1, 2).to(x.dtype)

    def sizes(side: int) -> torch.Tensor:
        starts = torch.arange(0, side, grid.window_size, device=key.device)
        return (side - starts).clamp(max=grid.window_size)

    tokens = torch.outer(sizes(grid.height), sizes(grid.width)).flatten()
    share = tokens.to(compute_dtype(key)) / grid.window_size**2
    return Tiles(averages(key), averages(value), share.log())


def pooled_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tiles: Tiles,
    grid: WindowGrid,
    num_heads: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Return the attention of each token to the tokens of its window and to all tiles.

    Both are in one softmax, as in Focal Transformer (Yang et al., 2021, section 3.2)::

        weights = softmax([q k^T / sqrt(d) + bias, q k_tiles^T / sqrt(d) + log(tokens / w**2)])

    A whole tile weighs as much as one token of the window with its logit, and a tile at the map's
    edge as much less as it has fewer tokens (Bolya et al., 2023, Token Merging, equation 1:
    proportional attention). So weights of attention within windows are a good start. A relative
    position bias lower by `log(w**2)` lets a tile weigh as much as its tokens.

    Args:
        query, key, value: `(B, N, C)`, queries and keys normed and rotated by their position on the
            whole map.
        tiles: of the whole map.
        grid: the map of N tokens, or a band, and its windows.
        num_heads: heads that share the C channels, `head_dim` each.
        bias: relative position bias `((2 w - 1)**2, heads)` of the window's logits, or None.

    Returns:
        `(B, N, C)`.
    """
    layout, window = window_layout(grid, query.device), grid.window_size**2

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)  # (B, heads, tokens, d)

    def windows(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(2, (-1, window))  # (B, heads, num_windows, w**2, ...)

    dtype = compute_dtype(query)
    q, k, v = (heads(x).index_select(2, layout.order) for x in (query, key, value))
    q = q.to(dtype) * q.shape[-1] ** -0.5
    near = windows(q) @ windows(k.to(dtype)).transpose(-1, -2)
    near = near + window_bias(bias, grid, q).transpose(0, 1)
    far = q @ heads(tiles.key).to(dtype).transpose(-1, -2) + tiles.bias  # (B, heads, slots, M)

    weights = torch.cat([near.flatten(2, 3), far], dim=-1).softmax(-1).to(value.dtype)
    near, far = weights.split([window, far.shape[-1]], dim=-1)
    out = (windows(near) @ windows(v)).flatten(2, 3) + far @ heads(tiles.value)
    return out.index_select(2, layout.inverse).transpose(1, 2).flatten(2)
