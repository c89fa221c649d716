"""The global context: what a window sees of the rest of the map."""

from __future__ import annotations

import torch
from torch import nn

from .cpu import Linear


class SqueezeExcitation(nn.Module):
    """Scale each channel by a gate computed from the means of all (Hu et al., 2018, section 3)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(channels, channels // 4, bias=False),
            nn.GELU(),
            nn.Linear(channels // 4, channels, bias=False),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.fc(x.mean(dim=(2, 3))).sigmoid()
        return x * gate[:, :, None, None]


class QueryFeatures(nn.Module):
    """`x + Conv1x1(SE(GELU(DepthwiseConv3x3(x))))` on a map `(B, C, H, W)`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
            nn.GELU(),
            SqueezeExcitation(channels),
            nn.Conv2d(channels, channels, 1, bias=False),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x)


class GlobalContext(nn.Module):
    """Weights of the global context: features of the whole map's queries, keys and values.

    Args:
        num_heads, head_dim: heads and channels per head.
        window_size: side of a window in tokens.
    """

    def __init__(self, num_heads: int, head_dim: int, window_size: int) -> None:
        super().__init__()
        dim = num_heads * head_dim
        self.query_feat_extract = nn.Sequential(QueryFeatures(dim), QueryFeatures(dim))
        self.to_global_kv = Linear(dim, 2 * dim)
        self.global_rel_pos_bias = nn.Parameter(torch.zeros((2 * window_size - 1) ** 2, num_heads))

    def reset_parameters(self) -> None:
        """Draw the weights again, with the values that a new module would have.

        Linear and convolutional layers take PyTorch's initialisation, in the order in which they
        are constructed; the relative position bias is zero.
        """
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                layer.reset_parameters()
        nn.init.zeros_(self.global_rel_pos_bias)

    def forward(self, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return features of a map of queries `(B, C, H, W)`, and the relative position bias.

        The bias is a copy: offloading loads a module's weights for its `forward` only, and unloads
        them afterwards.
        """
        return self.query_feat_extract(queries), self.global_rel_pos_bias.clone()
