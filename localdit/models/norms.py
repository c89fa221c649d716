"""Root mean square normalisation."""

from __future__ import annotations

import torch
from torch import nn


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype in which norms and rotations are computed: float32, or float64 for float64."""
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
