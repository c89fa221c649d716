"""What computes here: processor, GPU, versions; and by which path window attention is computed."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__

if TYPE_CHECKING:
    import torch

PACKAGES = ("torch", "diffusers", "triton")


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that matter, where they are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found | {"localdit": __version__}


def processor() -> str:
    """The processor's name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with the threads that PyTorch computes on."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"GPU of {processor()}"
    threads = torch.get_num_threads()
    return f"{threads} thread{'s' if threads > 1 else ''} of {processor()}"


def window_attention_path(
    device: torch.device, dtype: torch.dtype, window_size: int, num_heads: int, head_dim: int
) -> tuple[str, str]:
    """By what the backend "auto" computes attention within windows, and why.

    On a GPU that Triton's kernel could run on, it is tried there, once in a process.

    Returns:
        "triton" or "torch"; and the reason, in words.
    """
    import torch

    from .models.backends import why_not_triton, why_not_trusted
    from .models.windows import WindowGrid

    qkv = torch.empty(1, window_size**2, 3 * num_heads * head_dim, device=device, dtype=dtype)
    grid = WindowGrid(window_size, window_size, window_size)
    reason = why_not_triton(qkv, grid, num_heads)
    if reason is None and device.type == "cuda":
        reason = why_not_trusted(qkv.device, dtype, window_size, num_heads, head_dim)
    if reason is None and device.type == "cuda":
        return "triton", "it agrees with PyTorch's operations on this device"
    return "torch", f"Triton's kernel is not used: {reason or 'it runs on CUDA devices'}"
