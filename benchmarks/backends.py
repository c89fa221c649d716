"""Which of PyTorch's attention kernels the models run on.

Diffusers' PixArt calls `scaled_dot_product_attention` itself and not through the dispatcher of
attention backends, so that the kernels of PyTorch are all it can choose from. It is given the
fastest.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from typing import Any

from .cases import HEAD_DIM, HEADS, Case, Denoiser

KERNELS = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")
MATH_UP_TO = 1024  # pixels; beyond, it would hold all pairs of tokens and take gigabytes
OWN_CHOICE = "PyTorch's own choice"


def kernels(names: list[str], device: str) -> AbstractContextManager[Any]:
    """Attention runs on the first of `names` that can, within this context."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    # Where the order counts for nothing, on the CPU, plain products are the last resort.
    priority = device == "cuda"
    return sdpa_kernel([getattr(SDPBackend, name) for name in names], set_priority=priority)


def attention_of(denoiser: Denoiser, case: Case) -> tuple[list[str], str]:
    """The kernels that a denoiser runs on, none for PyTorch's own choice; and in words."""
    return pixart_kernels(case) if denoiser.use_global is None else localdit_kernels(case)


def localdit_kernels(case: Case) -> tuple[list[str], str]:
    """LocalDiT's: in training those that train.py chooses, in inference what PyTorch does."""
    import torch

    from localdit.training.components import attention_kernels

    if case.task == "training":
        precision = "bf16" if case.dtype == "bfloat16" else "no"
        chosen = attention_kernels(torch.device(case.device), precision)
        if len(chosen) == 1:
            return [chosen[0].name], f"{chosen[0].name}, as train.py chooses"
    return [], OWN_CHOICE


def pixart_kernels(case: Case) -> tuple[list[str], str]:
    """PixArt's: the kernel that is fastest at self-attention of this size, then the others.

    The others are there for attention to the text, whose mask not every kernel takes.

    Returns:
        The names in order, and how the first was chosen.
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
    told = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in known.items())
    return _with_others(best, usable, case), f"{best}, the fastest of {told}"


def _with_others(first: str, usable: list[str], case: Case) -> list[str]:
    """`first`, then what may stand in for it."""
    if case.device != "cuda" and first == "MATH":
        return [first]  # on the CPU any other that is allowed would go before it
    return [first, *(name for name in usable if name != first)]


def _seconds(names: list[str], case: Case, tokens: int, repeats: int = 1) -> float | None:
    """Seconds of self-attention over `tokens`, the best of a few; None where it does not run."""
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
        for _ in range(1 + repeats):  # the first warms up
            start = time.perf_counter()
            with kernels(names, case.device):
                out = torch.nn.functional.scaled_dot_product_attention(query, key, value)
                if training:
                    out.backward(query.detach())
            if case.device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    except RuntimeError:  # not for this device, dtype or size of head; or out of memory
        return None
    return min(times[1:])
