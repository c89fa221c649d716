"""Self-attention of LocalDiT, token by token: one dense matrix of logits, in float64."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from localdit.models.attention import LocalDiTAttention


def padded(size: int, window: int) -> int:
    return -(-size // window) * window


def normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / ((x * x).mean(-1, keepdim=True) + eps).sqrt() * weight


def rotated(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """RoPE at absolute positions on `(B, N, heads, d)`: complex numbers, one token at a time."""
    quarter = x.shape[-1] // 4
    frequencies = [10000 ** (-4 * j / x.shape[-1]) for j in range(quarter)]
    tokens = []
    for row in range(height):
        for column in range(width):
            angles = [column * f for f in frequencies] + [row * f for f in frequencies]
            turn = [complex(math.cos(a), math.sin(a)) for a in angles]
            token = x[:, row * width + column]
            pairs = torch.view_as_complex(token.unflatten(-1, (-1, 2)).contiguous())
            rotation = torch.tensor(turn, dtype=pairs.dtype)
            tokens.append(torch.view_as_real(pairs * rotation).flatten(-2))
    return torch.stack(tokens, dim=1)


def visible_tokens(
    height: int, width: int, window: int, shift: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the pairs of tokens that see each other, and their row of the bias table, `(N, N)`."""
    rows, columns = padded(height, window), padded(width, window)
    tokens = [(y, x) for y in range(height) for x in range(width)]
    places = []
    for y, x in tokens:
        r, c = (y - shift) % rows, (x - shift) % columns
        # Same window, and both on the same side of each seam that the roll made.
        home = (r // window, c // window, y < shift, x < shift)
        places.append((home, r % window, c % window))
    visible = torch.tensor([[a[0] == b[0] for b in places] for a in places])
    entry = torch.tensor(
        [
            [
                (a[1] - b[1] + window - 1) * (2 * window - 1) + (a[2] - b[2] + window - 1)
                for b in places
            ]
            for a in places
        ]
    )
    return visible, entry


def dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | float
) -> torch.Tensor:
    """`softmax(q k^T / sqrt(d) + bias) v` on `(B, N, heads, d)`, biases `(heads, N, N)`."""
    logits = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5 + bias
    return torch.einsum("bhij,bjhd->bihd", logits.softmax(-1), v)


def window_bias(attn: LocalDiTAttention, table: torch.Tensor, size: tuple[int, int]):
    visible, entry = visible_tokens(*size, attn.window_size, attn.shift_size)
    return table[entry].permute(2, 0, 1).masked_fill(~visible, -torch.inf)


def self_attention(
    attn: LocalDiTAttention, hidden_states: torch.Tensor, height: int, width: int, kind: str
) -> torch.Tensor:
    """Return the output of `attn` with the processor of a layer type."""
    qkv = hidden_states @ attn.to_qkv.weight.T + attn.to_qkv.bias
    q, k, v = qkv.unflatten(-1, (3, attn.num_heads, attn.head_dim)).unbind(2)
    q = normed(q, attn.norm_q.weight, attn.norm_q.eps)
    k = normed(k, attn.norm_k.weight, attn.norm_k.eps)
    if attn.do_rope:
        q, k = rotated(q, height, width), rotated(k, height, width)

    size = (height, width)
    if kind == "full":
        out = dense(q, k, v, 0.0)
    elif kind == "local_pooled":
        bias = window_bias(attn, attn.local_rel_pos_bias, size)
        out = with_tiles(q, k, v, bias, tiles(attn, *size), attn.window_size)
    else:
        out = dense(q, k, v, window_bias(attn, attn.local_rel_pos_bias, size))
    if kind == "local_global":
        context = attn.global_context
        features = global_features(attn, q, height, width)
        kv = k.flatten(2) @ context.to_global_kv.weight.T + context.to_global_kv.bias
        gk, gv = kv.unflatten(-1, (2, attn.num_heads, attn.head_dim)).unbind(2)
        seen = dense(features, gk, gv, window_bias(attn, context.global_rel_pos_bias, size))
        out = (out + seen) / 2
    to_out = attn.to_out[0]
    return out.flatten(2) @ to_out.weight.T + to_out.bias + hidden_states


def tiles(attn: LocalDiTAttention, height: int, width: int) -> torch.Tensor:
    """Return the tokens of each tile, `(tiles, N)`: 1 where a token is in it."""
    w = attn.window_size
    homes = [(y // w, x // w) for y in range(height) for x in range(width)]
    return torch.tensor([[home == tile for home in homes] for tile in sorted(set(homes))]).double()


def with_tiles(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    tiles: torch.Tensor,
    window: int,
) -> torch.Tensor:
    """Attend to tokens and tiles; the logit of a tile is the mean of the logits of its tokens."""
    logits = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
    count = tiles.sum(1)
    of_tiles = logits @ tiles.T / count + (count / window**2).log()
    weights = torch.cat([logits + bias, of_tiles], dim=-1).softmax(-1)
    # A tile hands its weight to its tokens in equal parts: its value is the mean of theirs.
    weights = weights[..., : len(bias[0])] + weights[..., len(bias[0]) :] / count @ tiles
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def global_features(
    attn: LocalDiTAttention, q: torch.Tensor, height: int, width: int
) -> torch.Tensor:
    """Two residual convolution stages on the padded, rolled map of queries; back in token order."""
    w, shift = attn.window_size, attn.shift_size
    rows, columns = padded(height, w), padded(width, w)
    image = q.new_zeros(q.shape[0], q[0, 0].numel(), rows, columns)
    for y in range(height):
        for x in range(width):
            image[:, :, (y - shift) % rows, (x - shift) % columns] = q[:, y * width + x].flatten(1)
    for stage in attn.global_context.query_feat_extract:
        depthwise, _, squeeze, pointwise = stage.conv
        x = F.conv2d(image, depthwise.weight, padding=1, groups=image.shape[1])
        x = x * 0.5 * (1 + torch.erf(x / 2**0.5))
        gate = x.mean((2, 3)) @ squeeze.fc[0].weight.T
        gate = (gate * 0.5 * (1 + torch.erf(gate / 2**0.5))) @ squeeze.fc[2].weight.T
        x = x * torch.sigmoid(gate)[..., None, None]
        image = image + torch.einsum("oc,bcyx->boyx", pointwise.weight[:, :, 0, 0], x)
    tokens = [
        image[:, :, (y - shift) % rows, (x - shift) % columns]
        for y in range(height)
        for x in range(width)
    ]
    return torch.stack(tokens, dim=1).unflatten(-1, (attn.num_heads, attn.head_dim))
