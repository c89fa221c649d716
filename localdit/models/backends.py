"""The choice of what computes attention within windows: PyTorch's operations or Triton's kernel.

Hidden state: the results of the checks of a device are cached for the life of the process, up to 64
of each kind; `localdit.models.clear_caches` clears them.
"""

from __future__ import annotations

import functools
import os
import warnings

import torch

from . import window_attention_triton as kernel
from .layers import RMSNorm, recomputed
from .window_attention import window_attention
from .windows import WindowGrid

BACKENDS = ("auto", "torch", "triton")


def checked_backend(backend: str) -> str:
    """Return the name of a backend if it can be chosen here."""
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


def attend_within_windows(
    backend: str,
    qkv: torch.Tensor,
    grid: WindowGrid,
    num_heads: int,
    norms: tuple[RMSNorm, RMSNorm] | None,
    do_rope: bool,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Compute window attention with a backend: see `window_attention.window_attention`.

    In training, PyTorch's operations are computed again in the backward pass, so that their
    intermediate results take no memory. The kernel does so by itself.

    Args:
        backend: "torch", "triton", or "auto": Triton's kernel if it can be used and agrees with
            PyTorch's operations on this device, and PyTorch's operations otherwise.
        qkv, grid, num_heads, norms, do_rope, bias: as for `window_attention.window_attention`.
    """
    arguments = (qkv, grid, num_heads, norms, do_rope, bias)
    if backend == "triton" or (backend == "auto" and qkv.device.type == "cuda"):
        reason = why_not_triton(*arguments)
        if reason is None and backend == "auto":
            head_dim = qkv.shape[2] // (3 * num_heads)
            reason = why_not_trusted(qkv.device, qkv.dtype, grid.window_size, num_heads, head_dim)
        if reason is None:
            return kernel.window_attention(*arguments)
        if backend == "triton":
            raise ValueError(
                f"The backend 'triton' of window attention cannot be used here: {reason}. Choose "
                "another with `set_window_attention_backend('torch')`, or 'auto'."
            )
    if torch.is_grad_enabled():
        return recomputed(window_attention, *arguments)
    return window_attention(*arguments)


def why_not_triton(
    qkv: torch.Tensor,
    grid: WindowGrid,
    num_heads: int,
    norms: tuple[RMSNorm, RMSNorm] | None = None,
    do_rope: bool = False,
    bias: torch.Tensor | None = None,
) -> str | None:
    """Return the reason why Triton's kernel cannot take these arguments; None if it can."""
    head_dim, window_size = qkv.shape[-1] // (3 * num_heads), grid.window_size
    weights: list[torch.Tensor] = [norm.weight for norm in norms or ()]
    weights += [] if bias is None else [bias]
    for dtype in (qkv.dtype, *(weight.dtype for weight in weights)):
        if dtype not in kernel.DTYPES:
            return f"it computes in float16, bfloat16 and float32, not in {dtype}"
    if any(weight.device != qkv.device for weight in weights):
        return "it does not wait for weights that hooks bring to the device (offloading)"
    if window_size > kernel.MAX_WINDOW_SIZE:
        return f"its windows have at most {kernel.MAX_WINDOW_SIZE} tokens a side, not {window_size}"
    if head_dim % 2 or head_dim > kernel.MAX_HEAD_DIM:
        most = kernel.MAX_HEAD_DIM
        return f"its heads have an even number of channels, at most {most}, not {head_dim}"
    device = qkv.device
    interpreting = device.type == "cpu" and _is_interpreting()
    if device.type != "cuda" and not interpreting:
        return f"it runs on CUDA devices, not on {device.type}"
    version = _triton_version()
    if version is None:
        return "Triton is not installed (`pip install triton`, on Linux)"
    if interpreting:
        return None
    if version < (3, 3) and window_size > 5:
        return "windows of more than 5 tokens a side need Triton 3.3 or newer"
    return _why_not_on_gpu(device.index)


# Largest difference between the kernel and PyTorch's operations in the same dtype, as a fraction of
# the largest value: a few roundings of the values and of the terms of their sums.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@torch.compiler.assume_constant_result
@functools.lru_cache(maxsize=64)
def why_not_trusted(
    device: torch.device, dtype: torch.dtype, window_size: int, num_heads: int, head_dim: int
) -> str | None:
    """Compare the kernel with PyTorch's operations on a small map, values and gradients.

    This happens once per process for each device and shape. If the kernel fails or differs, a
    warning says so, and the backend "auto" does not use it.

    Returns:
        The reason not to use the kernel, or None.
    """
    grid = WindowGrid(2 * window_size, 2 * window_size + 1, window_size, 1 % window_size, 0)
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    reason = None
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        norms = RMSNorm(head_dim, 1e-6).to(device, dtype), RMSNorm(head_dim, 1e-6).to(device, dtype)
        for norm in norms:
            norm.weight.data += drawn(head_dim) / 8
        qkv = drawn(2, grid.height * grid.width, 3 * num_heads * head_dim).requires_grad_()
        bias = drawn((2 * window_size - 1) ** 2, num_heads).requires_grad_()
        seen = drawn(2, grid.height * grid.width, num_heads * head_dim)
        inputs = [qkv, bias, *(norm.weight for norm in norms)]
        try:
            pairs = []
            for compute in (window_attention, kernel.window_attention):
                out = compute(qkv, grid, num_heads, norms, True, bias)
                pairs.append([out, *torch.autograd.grad((out * seen).sum(), inputs)])
            for expected, given in zip(*pairs, strict=True):
                error = (
                    given.float() - expected.float()
                ).abs().max() / expected.float().abs().max()
                if not error <= TOLERANCES[dtype]:
                    reason = f"it is {error:.2g} of the largest value off on this device"
        except Exception as error:  # a compiler or driver may raise anything
            reason = f"it failed on this device ({type(error).__name__}: {error})"
    if reason is not None:
        warnings.warn(
            f"Triton's kernel of window attention is not used: {reason}. PyTorch's operations "
            "compute the same, slower. Please report this.",
            RuntimeWarning,
            stacklevel=2,
        )
    return reason


@torch.compiler.assume_constant_result
@functools.cache
def _triton_version() -> tuple[int, int] | None:
    """Return major and minor version of Triton, or None if it is not installed."""
    try:
        import triton
    except ImportError:
        return None
    major, minor, *_ = triton.__version__.split(".")
    return int(major), int(minor)


@torch.compiler.assume_constant_result
def _is_interpreting() -> bool:
    """Return whether kernels run in Triton's interpreter, on any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@torch.compiler.assume_constant_result
@functools.lru_cache(maxsize=64)
def _why_not_on_gpu(index: int | None) -> str | None:
    """Return the reason why Triton's kernel cannot run on a GPU, or None."""
    if torch.version.hip is not None:
        return "it was never tried on AMD's GPUs"
    if torch.cuda.get_device_capability(index) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or higher"
    return None
