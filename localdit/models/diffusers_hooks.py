"""What Diffusers needs to know about this model: step caches and the scale of adapters.

FirstBlockCache and its relatives find blocks and attention by class, in registries that are private
to Diffusers. In a version without these registries the model works without step caches.

Hidden state: `register_for_caching` adds `LocalDiTBlock` and the attention processors to these two
registries when `block.py` is imported. The entries stay for the life of the process.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .attention import PROCESSORS, CrossAttention, CrossAttnProcessor, LocalDiTAttention


def register_for_caching(block: type[nn.Module]) -> None:
    """Register the blocks and their attention with Diffusers' step caches.

    Args:
        block: its `forward` takes and returns `hidden_states`, as one bare tensor.
    """
    # Caches of attention read this from each module.
    LocalDiTAttention.is_cross_attention = False
    CrossAttention.is_cross_attention = True
    try:
        helpers = importlib.import_module("diffusers.hooks._helpers")
    except ImportError:
        return
    helpers.TransformerBlockRegistry.register(
        block,
        helpers.TransformerBlockMetadata(
            return_hidden_states_index=0, return_encoder_hidden_states_index=None
        ),
    )
    for processor in (*PROCESSORS.values(), CrossAttnProcessor):
        helpers.AttentionProcessorRegistry.register(
            processor, helpers.AttentionProcessorMetadata(skip_processor_output_fn=_skipped_output)
        )


def _skipped_output(attention: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Return the output of an attention that is skipped: its input."""
    return args[0] if args else kwargs["hidden_states"]


def complete_cache_config(config: Any) -> Any:
    """Return a cache's configuration, TaylorSeer's with the names of this model's attention.

    By default TaylorSeer looks for names that end in `attn`, and would find none here. A
    configuration that names modules is returned as it is.
    """
    if type(config).__name__ != "TaylorSeerCacheConfig" or config.use_lite_mode:
        return config
    if config.cache_identifiers or config.skip_predict_identifiers:
        return config
    return dataclasses.replace(config, cache_identifiers=[r"transformer_blocks\.\d+\.attn\d"])


@contextmanager
def scaled_adapters(model: nn.Module, factor: float) -> Iterator[None]:
    """Multiply the weights of all active LoRA adapters, and restore them to the bit."""
    layers: list[Any] = []
    if getattr(model, "peft_config", None):
        from peft.tuners.tuners_utils import BaseTunerLayer  # an optional dependency

        layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    before = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            layer.scale_layer(factor)
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)
