"""Giving memory back to the system."""

import ctypes
import gc
import sys

import torch


def give_memory_back() -> None:
    """Return the memory of what was just dropped: PyTorch's caches, and what malloc keeps."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
    if sys.platform == "linux":
        # glibc keeps freed memory for later; other C libraries have no such function.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
