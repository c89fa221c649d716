"""The block of a LocalDiT, computed band by band in inference."""

from __future__ import annotations

import torch
from torch import nn

from .attention import CrossAttention, LocalDiTAttention
from .cpu import bands, write_band
from .diffusers_hooks import register_for_caching
from .layers import FeedForward, modulate


class LocalDiTBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward (PixArt-alpha, section 2.3)."""

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
            encoder_attention_bias: `(B, 1, L)`, added to the logits of cross-attention.
            timestep: `(B, 6 C)`, the timestep's modulation, shared by all blocks.
            height, width: size of the map in tokens.
        """
        modulation = self.scale_shift_table + timestep.unflatten(1, (6, -1))  # (B, 6, C)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=1)
        key, value = self.attn2.keys_and_values(encoder_hidden_states)

        grid = self.attn1.grid(height, width)
        whole = [(slice(None), grid)]
        parts = whole if self._is_hooked() else bands(grid, hidden_states)
        attends_in_bands = getattr(self.attn1.processor, "within_windows", False)
        if not attends_in_bands:
            modulated = modulate(self.norm1(hidden_states), shift_msa, scale_msa)
            hidden_states = torch.addcmul(hidden_states, gate_msa, self.attn1(modulated, grid))
            del modulated

        # Allocated before anything is computed, the result takes the place of the map before the
        # last one. Otherwise smaller tensors would settle there, and the peak would be higher.
        out = torch.empty_like(hidden_states) if len(parts) > 1 else None
        for tokens, band in parts:
            x = hidden_states[:, tokens]
            if attends_in_bands:
                modulated = modulate(self.norm1(x), shift_msa, scale_msa)
                x = torch.addcmul(x, gate_msa, self.attn1(modulated, band))
                del modulated
            x = x + self.attn2(x, key, value, encoder_attention_bias)
            x = torch.addcmul(x, gate_mlp, self.ff(modulate(self.norm2(x), shift_mlp, scale_mlp)))
            out = write_band(out, x, tokens, grid)
        assert out is not None
        return out

    def _is_hooked(self) -> bool:
        """Return whether Diffusers' hooks are set: caches expect one call of each part per step."""
        registries = (
            getattr(x, "_diffusers_hook", None) for x in (self.attn1, self.attn2, self.ff)
        )
        return any(getattr(registry, "hooks", None) for registry in registries)


register_for_caching(LocalDiTBlock)
