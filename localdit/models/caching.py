"""What the step caches of Diffusers need to know of this model's parts.

FirstBlockCache and its kin find blocks and attention through registries, by their classes. These
registries are private to Diffusers: where a version has none, the model works without step caches.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

from torch import nn

from .attention import PROCESSORS, CrossAttention, CrossAttnProcessor, LocalDiTAttention


def register_for_caching(block: type[nn.Module]) -> None:
    """Tell Diffusers how the blocks and their attention are called.

    Args:
        block: its `forward` takes and returns `hidden_states`, as one bare tensor.
    """
    # Caches of attention ask each module for it.
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
            processor, helpers.AttentionProcessorMetadata(skip_processor_output_fn=_unattended)
        )


def completed(config: Any) -> Any:
    """A cache's configuration; TaylorSeer's with this model's attention, unless it names modules.

    The names that it looks for by default end in `attn`, and so none here would be found.
    """
    if type(config).__name__ != "TaylorSeerCacheConfig" or config.use_lite_mode:
        return config
    if config.cache_identifiers or config.skip_predict_identifiers:
        return config
    return dataclasses.replace(config, cache_identifiers=[r"transformer_blocks\.\d+\.attn\d"])


def _unattended(attention: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What stands for an attention that is skipped: its input."""
    return args[0] if args else kwargs["hidden_states"]
