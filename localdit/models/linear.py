"""Linear layers, and the feed-forward made of them, as fast as a CPU allows.

In float32 PyTorch takes MKL for the matrix products of a linear layer. oneDNN, which it brings
along as well, computes them up to a third faster on AMD processors, and the GELU that follows in
the same pass.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.attention import FeedForward as DiffusersFeedForward
from torch import nn


class Linear(nn.Linear):
    """`nn.Linear`, in inference on a CPU by oneDNN."""

    def forward(self, input: torch.Tensor, gelu: bool = False) -> torch.Tensor:
        """Return `input @ weight.T + bias`, where asked for with GELU (its tanh form) on it.

        Args:
            input: `(..., in_features)`.
            gelu: whether GELU is taken of the result.

        Returns:
            `(..., out_features)`.
        """
        if self._onednn_suits(input):
            after, form = ("gelu", "tanh") if gelu else ("none", None)
            fused = torch.ops.mkldnn._linear_pointwise
            return fused(input, self.weight, self.bias, after, [], form)
        output = super().forward(input)
        return F.gelu(output, approximate="tanh") if gelu else output

    def _onednn_suits(self, input: torch.Tensor) -> bool:
        """Whether these are plain tensors on a CPU that nothing watches or changes on the way."""
        return (
            input.device.type == "cpu"
            and type(input) is torch.Tensor
            and type(self.weight) is nn.Parameter  # not quantized or sharded
            and input.dtype == self.weight.dtype
            and input.dtype in (torch.float32, torch.bfloat16)
            and input.numel() > 0
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()  # the compiler does likewise
            and onednn_is_there()
        )


def onednn_is_there() -> bool:
    """Whether this PyTorch has oneDNN's linear layer beside MKL's, and may use it."""
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


class FeedForward(DiffusersFeedForward):
    """Diffusers' feed-forward, with its linear layers and GELU computed as here.

    Args:
        dim: channels.
        dropout: probability of dropping a hidden channel in training.
        activation_fn: activation by its name in Diffusers.
    """

    def __init__(self, dim: int, dropout: float, activation_fn: str) -> None:
        super().__init__(dim, dropout=dropout, activation_fn=activation_fn)
        if activation_fn == "gelu-approximate":
            self.net[0] = LinearGELU(_same_weights(self.net[0].proj))
        self.net[2] = _same_weights(self.net[2])


class LinearGELU(nn.Module):
    """A linear layer with GELU (tanh form) on it."""

    def __init__(self, proj: Linear) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if type(self.proj) is Linear:
            return self.proj(hidden_states, gelu=True)
        # An adapter or a quantized layer has taken its place.
        return F.gelu(self.proj(hidden_states), approximate="tanh")


def _same_weights(layer: nn.Linear) -> Linear:
    with torch.device("meta"):  # nothing is drawn
        linear = Linear(layer.in_features, layer.out_features)
    linear.weight, linear.bias = layer.weight, layer.bias
    return linear
