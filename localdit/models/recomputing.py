"""Keeping little for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
    """Call `function`, keeping nothing for the backward pass but the arguments.

    The backward pass computes anew what lies between them and the result. That pays off where much
    memory is taken for little work. The function must draw no random numbers. What is compiled is
    left to the compiler, which weighs keeping against computing anew by itself.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
