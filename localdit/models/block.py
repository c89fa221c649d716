"""The block of a LocalDiT, computed band by band in inference."""

from __future__ import annotations

import torch
from torch import nn

from .attention import CrossAttention, LocalDiTAttention
from .bands import in_bands
from .caching import register_for_caching
from .linear import FeedForward
from .windows import WindowGrid


class LocalDiTBlock(nn.Module):
    """Self-attention, attention to the text, feed-forward (PixArt-alpha, section 2.3)."""

    def __init__(
        self,
        attn1: LocalDiTAttention,
        attn2: CrossAttention,
        dim: int,
        activation_fn: str,
        norm_eps: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps, elementwise_affine=False)
        self.attn1 = attn1
        self.attn2 = attn2
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps, elementwise_affine=False)
        self.ff = FeedForward(dim, dropout, activation_fn)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_bias: torch.Tensor | None,
        timestep: torch.Tensor,
        height: int,
        width: int,
    ) -> torch.Tensor:
        """Run the block.

        Args:
            hidden_states: `(B, height * width, C)` image tokens.
            encoder_hidden_states: `(B, L, C)` text tokens.
            encoder_attention_bias: `(B, 1, L)`, added to the logits of attention to the text.
            timestep: `(B, 6 C)`, the timestep's modulation, shared by all blocks.
            height, width: size of the map in tokens.
        """
        modulation = self.scale_shift_table + timestep.unflatten(1, (6, -1))  # (B, 6, C)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=1)
        text = self.attn2.keys_and_values(encoder_hidden_states)

        def see_each_other(x: torch.Tensor, grid: WindowGrid) -> torch.Tensor:
            normed = torch.addcmul(shift_msa, self.norm1(x), 1 + scale_msa)
            return torch.addcmul(x, gate_msa, self.attn1(normed, grid))

        def read_and_think(x: torch.Tensor) -> torch.Tensor:
            x = x + self.attn2(x, *text, encoder_attention_bias)
            normed = torch.addcmul(shift_mlp, self.norm2(x), 1 + scale_mlp)
            return torch.addcmul(x, gate_mlp, self.ff(normed))

        grid = self.attn1.grid(height, width)
        if self._is_hooked():
            return read_and_think(see_each_other(hidden_states, grid))
        if getattr(self.attn1.processor, "within_windows", False):
            return in_bands(
                lambda tokens, band: read_and_think(see_each_other(hidden_states[:, tokens], band)),
                grid,
                hidden_states,
                same_shape=True,
            )
        hidden_states = see_each_other(hidden_states, grid)
        return in_bands(
            lambda tokens, _: read_and_think(hidden_states[:, tokens]),
            grid,
            hidden_states,
            same_shape=True,
        )

    def _is_hooked(self) -> bool:
        """Whether hooks of Diffusers watch the parts: caches expect one call of each in a step."""
        registries = (
            getattr(x, "_diffusers_hook", None) for x in (self.attn1, self.attn2, self.ff)
        )
        return any(getattr(registry, "hooks", None) for registry in registries)


register_for_caching(LocalDiTBlock)
