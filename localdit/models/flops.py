"""The number of floating-point operations of a LocalDiT, from its shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .attention import (
    CrossAttention,
    FullAttnProcessor,
    LocalDiTAttention,
    LocalGlobalAttnProcessor,
    LocalPooledAttnProcessor,
)
from .global_context import SqueezeExcitation
from .layers import FeedForward
from .transformer import LocalDiTTransformer2DModel
from .windows import Route


def forward_flops(
    transformer: LocalDiTTransformer2DModel | Mapping[str, Any],
    height: int,
    width: int,
    text_tokens: int,
    route: Route | None = None,
) -> int:
    """Return the operations of a forward pass for one picture, two per multiply-add.

    This counts matrix products and convolutions as they are computed: in window attention, each
    slot of the map, padded to whole windows, attends to all slots of its window, and with pooled
    keys to as many tiles as the map has windows. It does not count
    norms, activations, masks and sums. A training step takes three times as many operations: the
    backward pass has two products for each product of the forward pass. Results that the backward
    pass computes again, in attention or by gradient checkpointing, do not count.

    Args:
        transformer: the model, with its present processors; or its configuration.
        height, width: size of the latents.
        text_tokens: tokens of the caption, padding included.
        route: the only tokens that take certain blocks.
    """
    if isinstance(transformer, LocalDiTTransformer2DModel):
        model = transformer
    else:
        with torch.device("meta"):
            model = LocalDiTTransformer2DModel.from_config(dict(transformer))
    patch = model.config.patch_size
    rows, columns = height // patch, width // patch
    tokens = rows * columns

    products = tokens * (_weights(model.pos_embed) + _weights(model.proj_out))
    products += _weights(model.adaln_single)
    if model.use_additional_conditions:  # height and width pass one after the other
        products += _weights(model.adaln_single.emb.resolution_embedder)
    if model.caption_projection is not None:
        products += text_tokens * _weights(model.caption_projection)
    for index, block in enumerate(model.transformer_blocks):
        size = rows, columns
        if route is not None and index in route.blocks:
            size = route.height, route.width
        products += _block(block, *size, text_tokens)
    return 2 * products


def _block(block: nn.Module, rows: int, columns: int, text_tokens: int) -> int:
    tokens, products = rows * columns, 0
    for module in block.modules():
        if isinstance(module, LocalDiTAttention):
            products += _self_attention(module, rows, columns)
        elif isinstance(module, CrossAttention):
            products += tokens * (_weights(module.to_q) + _weights(module.to_out))
            products += text_tokens * (_weights(module.to_k) + _weights(module.to_v))
            products += 2 * tokens * text_tokens * module.num_heads * module.head_dim
        elif isinstance(module, FeedForward):
            products += tokens * _weights(module)
    return products


def _weights(module: nn.Module) -> int:
    """Return the multiplications of a module's linear layers and convolutions at one position."""
    return sum(
        layer.weight.numel()
        for layer in module.modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    )


def _self_attention(attn: LocalDiTAttention, rows: int, columns: int) -> int:
    tokens, dim, w = rows * columns, attn.num_heads * attn.head_dim, attn.window_size
    products = tokens * (_weights(attn.to_qkv) + _weights(attn.to_out))
    if isinstance(attn.processor, FullAttnProcessor):
        return products + 2 * tokens * tokens * dim  # logits, and the sum of the values
    grid = attn.grid(rows, columns)
    slots = grid.rows * grid.columns * w * w
    products += 2 * slots * w * w * dim
    if isinstance(attn.processor, LocalPooledAttnProcessor):
        products += 2 * slots * grid.rows * grid.columns * dim
    if isinstance(attn.processor, LocalGlobalAttnProcessor):
        context = attn.global_context
        assert context is not None
        products += 2 * slots * w * w * dim + tokens * _weights(context.to_global_kv)
        # The gates of the channels are computed once for the map.
        excitations = (x for x in context.modules() if isinstance(x, SqueezeExcitation))
        gates = sum(map(_weights, excitations))
        products += slots * (_weights(context.query_feat_extract) - gates) + gates
    return products
