"""Layers that the transformer's parts share: RMSNorm, rotary positions, tokens, feed-forward.

Hidden state: `rope_angles` caches up to 32 tensors on their devices; `localdit.models.clear_caches`
clears them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import FeedForward as DiffusersFeedForward
from diffusers.models.embeddings import get_1d_sincos_pos_embed_from_grid
from torch import nn
from torch.utils.checkpoint import checkpoint

from .cpu import Linear, bands, write_band
from .windows import WindowGrid, cached_tensors


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Return the dtype for norms and rotations: float32, or float64 for float64."""
    return torch.promote_types(tensor.dtype, torch.float32)


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x**2) + eps) * weight` over the last axis (Zhang & Sennrich, 2019).

    Computed in float32 at least, and returned in the dtype of the input.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states.to(compute_dtype(hidden_states))
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1]
        scaled, weight = x * torch.rsqrt(mean_square + self.eps), self.weight.to(x.dtype)
        scaled = scaled * weight if torch.is_grad_enabled() else scaled.mul_(weight)
        return scaled.to(hidden_states.dtype)


@cached_tensors(32)
def rope_angles(
    height: int, width: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Return the rotary angles of a row-major map, `(height * width, head_dim / 2)`.

    The first half of a token's angles follows its column, the second half its row, at frequencies
    `10000 ** (-4 j / head_dim)` for `j = 0 .. head_dim / 4 - 1` (RoFormer, section 3.4.2, applied
    to each axis).
    """
    exponents = torch.arange(0, head_dim, 4, device=device, dtype=dtype) / head_dim
    frequencies = 10000.0**-exponents  # (head_dim / 4,)
    x = torch.arange(width, device=device, dtype=dtype)[:, None] * frequencies
    y = torch.arange(height, device=device, dtype=dtype)[:, None] * frequencies
    grid = (height, width, len(frequencies))
    return torch.cat([x[None].expand(grid), y[:, None].expand(grid)], dim=-1).flatten(0, 1)


def apply_rope(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotate pairs of neighbouring channels: `(a, b) -> (a cos - b sin, b cos + a sin)`.

    Args:
        x: `(..., head_dim)`, in the dtype to compute in.
        angles: broadcast against `(..., head_dim / 2)`, in the same dtype.

    Returns:
        A tensor of the shape of `x`.
    """
    pairs = x.unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # the compiler fuses this, but not complex numbers
        (a, b), cos, sin = pairs.unbind(-1), angles.cos(), angles.sin()
        return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    # A product of complex numbers: one pass over memory, in a tenth of the time.
    turn = torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(torch.view_as_complex(pairs) * turn).flatten(-2)


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return `x * (1 + scale) + shift`, as adaptive layer norm does (Peebles & Xie, 2023)."""
    return torch.addcmul(shift, x, 1 + scale)


class PatchEmbedding(nn.Module):
    """Embed patches of latents as tokens with their positions.

    Positions are sines and cosines as in DiT (Peebles & Xie, 2023, section 3.2), column before row,
    of the token's coordinates divided by the map's size, times `base_size / interpolation_scale`.
    They are computed from the two axes in each call, so no table has to be kept.

    Args:
        patch_size: side of a patch, in latents.
        in_channels: channels of the latents.
        dim: channels C of a token, a multiple of 4.
        base_size: tokens along a side of the map that the model is made for.
        interpolation_scale: divides positions.
    """

    def __init__(
        self,
        patch_size: int,
        in_channels: int,
        dim: int,
        base_size: int,
        interpolation_scale: float,
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)
        self.base_size, self.interpolation_scale = base_size, interpolation_scale

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Embed latents `(B, in_channels, H, W)` as `(B, N, C)`, row-major."""
        patches = self.proj(latents)
        height, width = patches.shape[2:]
        patches = patches.flatten(2).transpose(1, 2)  # in memory, channels still come before tokens
        x, y = self._axis(width, patches), self._axis(height, patches)
        index = torch.arange(height * width, device=patches.device)

        out, grid = None, WindowGrid(height, width, window_size=1)
        for tokens, _ in bands(grid, patches):
            token = index[tokens]
            position = torch.cat([x[token % width], y[token // width]], dim=-1)
            embedded = (patches[:, tokens] + position).to(patches.dtype).contiguous()
            out = write_band(out, embedded, tokens, grid)
        assert out is not None
        return out

    def _axis(self, size: int, like: torch.Tensor) -> torch.Tensor:
        """Return the embedded positions along an axis, `(size, C / 2)`."""
        positions = torch.arange(size, device=like.device, dtype=torch.float32)
        positions = positions / (size / self.base_size) / self.interpolation_scale
        half = like.shape[2] // 2
        return get_1d_sincos_pos_embed_from_grid(half, positions, output_type="pt").float()


class FeedForward(DiffusersFeedForward):
    """Diffusers' feed-forward with `Linear` layers.

    Args:
        dropout: probability of dropping a hidden channel in training.
        activation_fn: activation by its name in Diffusers.
    """

    def __init__(self, dim: int, dropout: float, activation_fn: str) -> None:
        super().__init__(dim, dropout=dropout, activation_fn=activation_fn)
        if activation_fn == "gelu-approximate":
            self.net[0] = LinearGELU(_with_same_weights(self.net[0].proj))
        self.net[2] = _with_same_weights(self.net[2])


class LinearGELU(nn.Module):
    """A linear layer followed by GELU (tanh form)."""

    def __init__(self, proj: Linear) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if type(self.proj) is Linear:
            return self.proj(hidden_states, gelu=True)
        # An adapter or a quantized layer has replaced it.
        return F.gelu(self.proj(hidden_states), approximate="tanh")


def _with_same_weights(layer: nn.Linear) -> Linear:
    with torch.device("meta"):  # draws no random numbers
        linear = Linear(layer.in_features, layer.out_features)
    linear.weight, linear.bias = layer.weight, layer.bias
    return linear


def recomputed(function: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
    """Call `function` and keep only its arguments for the backward pass.

    The backward pass computes the intermediate results again. This pays off where they take much
    memory and little work. The function must draw no random numbers. In a compiled model the
    compiler decides what to keep.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
