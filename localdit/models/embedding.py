"""From latents to tokens."""

from __future__ import annotations

import torch
from diffusers.models.embeddings import get_1d_sincos_pos_embed_from_grid
from torch import nn

from .bands import in_bands
from .windows import WindowGrid


class PatchEmbedding(nn.Module):
    """Patches of latents as tokens that carry their position on the map.

    Positions are sines and cosines as in DiT (Peebles & Xie, 2023, section 3.2), column before row,
    of the token's place divided by the map's size, times `base_size / interpolation_scale`. They
    are made for each map from its two axes, so that none of any size has to be kept.

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
        patches = patches.flatten(2).transpose(1, 2)  # channels still before tokens in memory
        x, y = self._along(width, patches), self._along(height, patches)
        places = torch.arange(height * width, device=patches.device)

        def placed(tokens: slice, _: WindowGrid) -> torch.Tensor:
            place = places[tokens]
            position = torch.cat([x[place % width], y[place // width]], dim=-1)
            return (patches[:, tokens] + position).to(patches.dtype).contiguous()

        return in_bands(placed, WindowGrid(height, width, window_size=1), patches)

    def _along(self, size: int, like: torch.Tensor) -> torch.Tensor:
        """Embedded positions along an axis, `(size, C / 2)`."""
        positions = torch.arange(size, device=like.device, dtype=torch.float32)
        positions = positions / (size / self.base_size) / self.interpolation_scale
        half = like.shape[2] // 2
        return get_1d_sincos_pos_embed_from_grid(half, positions, output_type="pt").float()
