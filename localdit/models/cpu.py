"""Speed on a CPU: linear layers by oneDNN, blocks in bands, and attention in training.

**Linear layers.** PyTorch computes float32 linear layers with MKL. It also ships oneDNN, which
takes up to a third less time on AMD processors (measured on an AMD EPYC) and applies the GELU in
the same pass. `Linear` calls oneDNN in inference, and PyTorch's own function everywhere else.

**bfloat16.** On processors without AVX-512, PyTorch computes bfloat16 products in plain loops.
`Linear` has oneDNN compute them in float32 there, and rounds the results once, after the GELU. This
takes a sixth of the time (512 tokens, 1152 x 1152 to 4608 x 1152 weights, AMD EPYC with AVX2).

**Bands.** A block reads and writes a map of tokens. Computed all at once, its intermediate results
take several times the memory of the map and leave the caches of the processor. No token of a band
of whole window rows attends to a token outside it, so a block can run on one band after the other.
At 1024 pixels, the 18 layers of the released model then need 114 MiB beside the weights in float32;
with bands twice as large they need 160 MiB. GPUs use bands as well, much larger ones, to save
memory. Training and compiled models compute the whole map at once.

**Attention in training.** In bfloat16, the backward pass of PyTorch's fused attention is slow where
queries attend to few keys. `attention` takes a seventh of its time for 24 keys, forward and
backward, and two thirds for 256 (64 x 4 maps of 64 queries, 16 x 4 maps of 256; AMD EPYC with
AVX-512). PyTorch's own products, its MATH kernel, round and copy more: a step of a small model
takes 1.23 s with them instead of 1.00. In float32, and for more keys, the fused one is as fast or
faster.

**Freed memory.** glibc returns freed memory to the system beyond twice the largest block that it
has seen freed, 32 MiB at most, and the system clears every page that it hands out again. This took
4 % of a forward pass in float32. `keep_freed_memory` prevents it.

**oneDNN's primitives.** For each shape of its inputs, oneDNN compiles a primitive of up to a
megabyte, and PyTorch keeps 1024 of them in two caches. So memory grows with each picture size that
is drawn: by half over 150 sizes. This module makes the caches smaller, unless the environment
variables that size them are set. A step of the denoiser needs about 20 primitives. Measurement:
`python -m benchmarks.pipeline sizes`.

Hidden state: `keep_freed_memory` changes a setting of the C library, once per process. Importing
this module sets the two environment variables of `PRIMITIVES`; PyTorch reads them at its first
convolution or linear layer by oneDNN, so they have no effect after it.
"""

from __future__ import annotations

import functools
import os

import torch
import torch.nn.functional as F
from torch import nn

from .windows import WindowGrid

# Bytes of the tokens in a band, all maps of a batch together: enough for matrix products at full
# speed, and few enough for the intermediate results to stay small and, on a CPU, in its caches. At
# the 1152 channels of the released model, these are 256 tokens and 16384 tokens in float32.
BAND_ON_CPU = 256 * 1152 * 4
BAND_ON_GPU = 16384 * 1152 * 4

# Weights that are converted from bfloat16 to float32 at a time: 4 MiB of them.
WIDENED = 2**20

# Keys up to which explicit attention trains faster than PyTorch's fused one, in bfloat16.
MOST_KEYS = 256

# Capacities of PyTorch's cache of oneDNN's primitives and of oneDNN's own, in primitives. Both hold
# the same ones, so one cache is enough.
PRIMITIVES = {"LRU_CACHE_CAPACITY": "1", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32"}
for _variable, _capacity in PRIMITIVES.items():
    os.environ.setdefault(_variable, _capacity)


class Linear(nn.Linear):
    """`nn.Linear` that calls oneDNN for inference on a CPU."""

    def forward(self, input: torch.Tensor, gelu: bool = False) -> torch.Tensor:
        """Return `input @ weight.T + bias`, with GELU (its tanh form) applied if `gelu`.

        Args:
            input: `(..., in_features)`.
            gelu: apply GELU to the result.

        Returns:
            `(..., out_features)`.
        """
        if not self._can_use_onednn(input):
            output = super().forward(input)
            return F.gelu(output, approximate="tanh") if gelu else output
        after, form = ("gelu", "tanh") if gelu else ("none", None)
        fused = torch.ops.mkldnn._linear_pointwise
        if onednn_is_available(input.dtype):
            return fused(input, self.weight, self.bias, after, [], form)
        wide, out = input.float(), input.new_empty(*input.shape[:-1], self.out_features)
        step = WIDENED // self.in_features + 1
        for start in range(0, self.out_features, step):
            part = slice(start, start + step)
            bias = None if self.bias is None else self.bias[part].float()
            out[..., part] = fused(wide, self.weight[part].float(), bias, after, [], form)
        return out

    def _can_use_onednn(self, input: torch.Tensor) -> bool:
        """Return whether these are plain tensors on a CPU that nothing tracks or transforms."""
        return (
            input.device.type == "cpu"
            and type(input) is torch.Tensor
            and type(self.weight) is nn.Parameter  # not quantized or sharded
            and input.dtype == self.weight.dtype
            and input.dtype in (torch.float32, torch.bfloat16)
            and input.numel() > 0
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()  # the compiler chooses oneDNN by itself
            and onednn_is_available()
        )


def onednn_is_available(dtype: torch.dtype = torch.float32) -> bool:
    """Return whether this PyTorch has oneDNN's linear layer beside MKL's and may use it.

    Args:
        dtype: float32, or bfloat16, for which oneDNN needs a recent processor.
    """
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and (dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def trains_faster_explicitly(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Return whether `attention` is faster than PyTorch's fused attention for these, and allowed.

    Args:
        query, key: `(B, tokens, heads, head_dim)`.
    """
    return (
        query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and torch.backends.cuda.math_sdp_enabled()  # `sdpa_kernel` may ask for others
        and key.shape[1] <= MOST_KEYS
        and query.requires_grad
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return `softmax(q k^T / sqrt(d) + bias) v`, all `(B, tokens, heads, head_dim)`.

    Args:
        query: of N tokens.
        key, value: of L tokens.
        bias: broadcastable to `(B, heads, N, L)`.
    """
    logits = (query * query.shape[-1] ** -0.5).transpose(1, 2) @ key.permute(0, 2, 3, 1)
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    weights = logits.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
    return (weights @ value.transpose(1, 2)).transpose(1, 2)


@functools.cache
def keep_freed_memory() -> None:
    """Make the C library keep what one band frees for the next one.

    glibc keeps twice the largest block that it has seen freed. So this frees a block of the largest
    size that counts. It does nothing with other C libraries.
    """
    torch.empty(32 * 2**20 - 2**16, dtype=torch.uint8)


def bands(grid: WindowGrid, like: torch.Tensor) -> list[tuple[slice, WindowGrid]]:
    """Return the bands in which to compute what mixes no tokens of different windows.

    Use it with `write_band`::

        out = None
        for tokens, band in bands(grid, x):
            out = write_band(out, function(x[:, tokens], band), tokens, grid)

    Args:
        like: `(B, N, C)`, with the batch size, channels, dtype and device of the tokens.

    Returns:
        The tokens of each band, and the band as a map: see `WindowGrid.bands`. One band with the
        whole map in training, in a compiled model, and if the map is small.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return [(slice(None), grid)]
    on_cpu = like.device.type == "cpu"
    if on_cpu:
        keep_freed_memory()
    size_of_token = like.shape[0] * like.shape[2] * like.element_size()  # in all maps of the batch
    return grid.bands((BAND_ON_CPU if on_cpu else BAND_ON_GPU) // size_of_token)


def write_band(
    out: torch.Tensor | None, band: torch.Tensor, tokens: slice, grid: WindowGrid
) -> torch.Tensor:
    """Write the result of a band into the result of the map, and return the latter.

    Args:
        out: `(B, N, C)`, or None to allocate it.
        band: `(B, tokens in the band, C)`. If it covers the whole map, it is returned as it is.
    """
    num_tokens = grid.height * grid.width
    if band.shape[1] == num_tokens:
        return band
    if out is None:
        out = band.new_empty(band.shape[0], num_tokens, band.shape[2])
    out[:, tokens] = band
    return out
