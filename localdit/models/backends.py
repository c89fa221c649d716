"""Which implementation computes attention within windows."""

from __future__ import annotations

import functools
import os
from typing import Protocol

import torch

from . import window_attention_triton as kernel
from .window_attention import QueryKeyNorm, window_attention
from .windows import WindowGrid

BACKENDS = ("auto", "torch", "triton")


class WindowAttention(Protocol):
    """See `localdit.models.window_attention.window_attention`."""

    def __call__(
        self,
        qkv: torch.Tensor,
        grid: WindowGrid,
        num_heads: int,
        norm: QueryKeyNorm | None,
        do_rope: bool,
        bias: torch.Tensor | None,
    ) -> torch.Tensor: ...


def checked_backend(backend: str) -> str:
    """The name of a backend, if it can be chosen here.

    Raises:
        ValueError: for a name that is none.
        ImportError: for "triton" where Triton is not installed.
    """
    if backend not in BACKENDS:
        raise ValueError(
            f"The backend of window attention is {backend!r}; choose one of {', '.join(BACKENDS)}."
        )
    if backend == "triton" and _triton_version() is None:
        raise ImportError(
            "The backend 'triton' of window attention needs Triton, which is not installed: "
            "`pip install triton` (Linux), or choose the backend 'torch' or 'auto'."
        )
    return backend


def window_attention_backend(
    backend: str, qkv: torch.Tensor, grid: WindowGrid, num_heads: int
) -> WindowAttention:
    """What is to compute window attention of packed queries, keys and values.

    Args:
        backend: "torch", "triton", or "auto": Triton's kernel where it can be used, else PyTorch's
            operations.
        qkv: `(B, N, 3 C)`.
        grid: the map of N tokens and its windows.
        num_heads: heads that share the C channels.

    Raises:
        ValueError: if the backend is "triton" and it cannot be used, with the reason.
    """
    if backend == "torch":
        return window_attention
    reason = why_not_triton(qkv, grid.window_size, qkv.shape[-1] // (3 * num_heads))
    if reason is None and (backend == "triton" or qkv.is_cuda):
        return kernel.window_attention
    if backend == "triton":
        raise ValueError(
            f"The backend 'triton' of window attention cannot be used here: {reason}. Choose "
            "another with `set_window_attention_backend('torch')`, or 'auto'."
        )
    return window_attention


def why_not_triton(qkv: torch.Tensor, window_size: int, head_dim: int) -> str | None:
    """Why Triton's kernel cannot be used; None where it can."""
    if qkv.dtype not in kernel.DTYPES:
        return f"it computes in float16, bfloat16 and float32, not in {qkv.dtype}"
    if window_size > kernel.MAX_WINDOW_SIZE:
        return f"its windows have at most {kernel.MAX_WINDOW_SIZE} tokens a side, not {window_size}"
    if head_dim % 2 or head_dim > kernel.MAX_HEAD_DIM:
        most = kernel.MAX_HEAD_DIM
        return f"its heads have an even number of channels, at most {most}, not {head_dim}"
    interpreting = qkv.device.type == "cpu" and _is_interpreting()
    if qkv.device.type != "cuda" and not interpreting:
        return f"it runs on CUDA devices, not on {qkv.device.type}"
    version = _triton_version()
    if version is None:
        return "Triton is not installed (`pip install triton`, on Linux)"
    if interpreting:
        return None
    if version < (3, 3) and window_size > 5:
        return "windows of more than 5 tokens a side need Triton 3.3 or newer"
    return _why_not_on_gpu(qkv.device.index)


@torch.compiler.assume_constant_result
@functools.cache
def _triton_version() -> tuple[int, int] | None:
    try:
        import triton
    except ImportError:
        return None
    major, minor, *_ = triton.__version__.split(".")
    return int(major), int(minor)


@torch.compiler.assume_constant_result
def _is_interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@torch.compiler.assume_constant_result
@functools.cache
def _why_not_on_gpu(index: int | None) -> str | None:
    if torch.version.hip is not None:
        return "it was never tried on AMD's GPUs"
    if torch.cuda.get_device_capability(index) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or higher"
    return None
