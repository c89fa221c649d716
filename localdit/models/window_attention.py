"""Attention within windows in PyTorch's own operations, for any device.

One gather of the rows of all heads, two batched matrix products, one gather back. With pooled keys,
tokens also attend to averages of the whole map.

Hidden state: `_head_rows` caches up to 64 pairs of index tensors on their devices;
`localdit.models.clear_caches` clears them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .layers import RMSNorm, apply_rope, compute_dtype, rope_angles
from .windows import WindowGrid, cached_tensors, relative_position_index, window_layout


def window_attention(
    qkv: torch.Tensor,
    grid: WindowGrid,
    num_heads: int,
    norms: tuple[RMSNorm, RMSNorm] | None,
    do_rope: bool,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Return `softmax(q k^T / sqrt(d) + bias) v` within each window, q and k normed and rotated.

    Logits depend only on differences between rotary positions (RoFormer, section 3.1), and tokens
    that see each other are neighbours on the map. So positions within the window work for every
    window.

    Args:
        qkv: `(B, N, 3 C)`, queries, keys and values of a row-major map.
        grid: the map of N tokens and its windows of l = w**2 tokens.
        num_heads: heads that share the C channels, `head_dim` each.
        norms: of queries and of keys, over the channels of a head; None if they are normed already.
        do_rope: rotate queries and keys by their position.
        bias: relative position bias `((2 w - 1)**2, heads)`, or None.

    Returns:
        `(B, N, C)`.
    """
    batch, _, channels = qkv.shape
    w, head_dim = grid.window_size, channels // (3 * num_heads)
    rows = _head_rows(grid, num_heads, batch, qkv.device)
    heads = qkv.reshape(-1, head_dim).index_select(0, rows.order)
    heads = heads.view(3, -1, w * w, head_dim)  # (3, B * windows * heads, l, d)

    query, key = heads[:2].to(compute_dtype(qkv))
    if norms is not None:
        query, key = norms[0](query), norms[1](key)
    if do_rope:
        angles = rope_angles(w, w, head_dim, qkv.device, query.dtype)
        query, key = apply_rope(query, angles), apply_rope(key, angles)

    batches = batch, grid.rows * grid.columns, num_heads
    logits = torch.baddbmm(
        window_bias(bias, grid, query).expand(*batches, -1, -1).flatten(0, 2),
        query,
        key.transpose(1, 2),
        alpha=head_dim**-0.5,
    )
    out = torch.bmm(logits.softmax(-1).to(qkv.dtype), heads[2])
    return out.view(-1, head_dim).index_select(0, rows.inverse).view(batch, -1, channels // 3)


def window_bias(table: torch.Tensor | None, grid: WindowGrid, like: torch.Tensor) -> torch.Tensor:
    """Return the bias of each window's logits: the relative position bias, and -inf where hidden.

    Args:
        table: `((2 w - 1)**2, heads)`, or None for no bias.
        like: a tensor with the dtype and device of the logits.

    Returns:
        A tensor that broadcasts to `(num_windows, heads, w**2, w**2)`.
    """
    hidden = window_layout(grid, like.device).hidden
    bias = like.new_zeros(1, 1, 1, 1)
    if table is not None:
        index = relative_position_index(grid.window_size, like.device)
        bias = table.to(like.dtype)[index].permute(2, 0, 1)[None]  # (1, heads, l, l)
    return bias if hidden is None else torch.where(hidden[:, None], -torch.inf, bias)


class _HeadRows(NamedTuple):
    """The places of each head's rows."""

    # (3 * batch * num_windows * heads * w**2,). Row of packed queries, keys and values,
    # (batch * N * 3 * heads, d), that each slot reads.
    order: torch.Tensor
    # (batch * N * heads,). Slot of (batch * num_windows * heads * w**2, d) that holds each head of
    # each token.
    inverse: torch.Tensor


@cached_tensors(64)
def _head_rows(grid: WindowGrid, num_heads: int, batch: int, device: torch.device) -> _HeadRows:
    layout = window_layout(grid, device)
    slots = grid.window_size**2
    part = torch.arange(3, device=device).view(3, 1, 1, 1, 1)
    item = torch.arange(batch, device=device).view(batch, 1, 1, 1)
    head = torch.arange(num_heads, device=device)[:, None]
    token = layout.order.view(-1, 1, slots) + item * (grid.height * grid.width)
    order = (token * 3 + part) * num_heads + head  # (3, batch, num_windows, heads, l)

    window, slot = layout.inverse // slots, layout.inverse % slots
    window = window[:, None] + item[..., 0] * (grid.rows * grid.columns)
    inverse = (window * num_heads + head[:, 0]) * slots + slot[:, None]  # (batch, N, heads)
    return _HeadRows(order.flatten().int(), inverse.flatten().int())


# With pooled keys


class Tiles(NamedTuple):
    """Averages of a map over tiles of `window_size x window_size` tokens.

    Tiles start in the map's first corner in every layer, whatever the shift of the windows. Those
    at the right and lower edges hold the tokens that are left.
    """

    key: torch.Tensor  # (B, M, C), averages of the tokens' keys, normed and rotated
    value: torch.Tensor  # (B, M, C), averages of their values
    bias: torch.Tensor  # (M,), the log of the share of its `window_size**2` tokens that a tile has


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
