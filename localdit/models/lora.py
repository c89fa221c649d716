"""Adapters within a model: how much they weigh in one call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def scales_adapters(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Have a model's `forward` obey `cross_attention_kwargs={"scale": factor}`.

    The scale is taken out of them before `forward` sees them.
    """

    @functools.wraps(forward)
    def scaled(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        options = kwargs.get("cross_attention_kwargs") or {}
        if "scale" not in options:
            return forward(self, *args, **kwargs)
        others = {name: value for name, value in options.items() if name != "scale"}
        with _scaled_adapters(self, options["scale"]):
            return forward(self, *args, **kwargs | {"cross_attention_kwargs": others})

    return scaled


@contextmanager
def _scaled_adapters(model: nn.Module, factor: float) -> Iterator[None]:
    """Multiply the weights of all active adapters, and give them back to the bit."""
    layers: list[Any] = []
    if getattr(model, "peft_config", None):
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    before = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            layer.scale_layer(factor)
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)
