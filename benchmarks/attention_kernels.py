"""Choose the PyTorch attention kernels for each model.

Diffusers' PixArt calls `scaled_dot_product_attention` directly, not through Diffusers' attention
dispatcher, so it can only use PyTorch's kernels. The benchmarks give it the fastest.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from typing import Any

from .cases import HEAD_DIM, HEADS, PIXART, Case, Denoiser

KERNELS = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")
MATH_UP_TO = 1024  # pixels; above, it holds all pairs of tokens and takes gigabytes
OWN_CHOICE = "PyTorch's own choice"


def kernels(names: list[str], device: str) -> AbstractContextManager[Any]:
    """Return a context in which attention uses the first of `names` that works."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    # The CPU ignores the order and uses plain products only as a last resort.
    priority = device == "cuda"
    return sdpa_kernel([getattr(SDPBackend, name) for name in names], set_priority=priority)


def attention_of(denoiser: Denoiser, case: Case) -> tuple[list[str], str]:
    """Return the kernels of a denoiser (empty for PyTorch's own choice) and a description."""
    return pixart_kernels(case) if denoiser == PIXART else ([], OWN_CHOICE)


def pixart_kernels(case: Case) -> tuple[list[str], str]:
    """Return PixArt's kernels: the fastest for self-attention of this size, then the others.

    Cross-attention needs the others, because not every kernel accepts its mask.

    Returns:
        The names in order of preference, and how the first was chosen.
    """
    usable = [name for name in KERNELS if _seconds([name], case, tokens=64) is not None]
    rivals = [name for name in usable if name != "MATH" or case.pixels <= MATH_UP_TO]
    if len(rivals) == 1:
        return _with_others(rivals[0], usable, case), f"{rivals[0]}, the only usable one"
    if not rivals:
        return [], OWN_CHOICE
    times = {name: _seconds([name], case, case.tokens, repeats=2) for name in rivals}
    known = {name: seconds for name, seconds in times.items() if seconds is not None}
    if not known:
        return [], OWN_CHOICE
    best = min(known, key=known.__getitem__)
    compared = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in known.items())
    return _with_others(best, usable, case), f"{best}, the fastest of {compared}"


def _with_others(first: str, usable: list[str], case: Case) -> list[str]:
    """Return `first`, then its substitutes."""
    if case.device != "cuda" and first == "MATH":
        return [first]  # on the CPU any other allowed kernel would take precedence
    return [first, *(name for name in usable if name != first)]


def _seconds(names: list[str], case: Case, tokens: int, repeats: int = 1) -> float | None:
    """Return the shortest time of self-attention over `tokens`; None if it does not run."""
    import torch

    training = case.task == "training"
    query, key, value = (
        torch.randn(
            (case.batch_size, HEADS, tokens, HEAD_DIM),
            device=case.device,
            dtype=getattr(torch, case.dtype),
            requires_grad=training,
        )
        for _ in range(3)
    )
    times = []
    try:
        for _ in range(1 + repeats):  # the first is a warm-up
            start = time.perf_counter()
            with kernels(names, case.device):
                out = torch.nn.functional.scaled_dot_product_attention(query, key, value)
                if training:
                    out.backward(query.detach())
            if case.device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    except RuntimeError:  # unsupported device, dtype or head size; or out of memory
        return None
    return min(times[1:])
