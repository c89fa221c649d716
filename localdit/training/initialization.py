"""The weights a new LocalDiT transformer starts training from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from localdit.models.transformer import LocalDiTTransformer2DModel


@torch.no_grad()
def initialize_weights(transformer: LocalDiTTransformer2DModel) -> None:
    """Initialise a new transformer in place, as DiT and PixArt are (Peebles & Xie, 2023, section 3).

    Linear layers are Xavier-uniform with zero bias, and so is the patch embedding, a convolution that
    acts as one. The time embedding, the AdaLN layer and the caption projection start with weights of
    standard deviation 0.02. Cross-attention's output, the output layer and the relative position
    biases start at zero: the untrained model predicts zero, and ignores the text.
    """
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            _zero(module.bias)
    patch_embedding = transformer.pos_embed.proj
    nn.init.xavier_uniform_(patch_embedding.weight.flatten(1))
    _zero(patch_embedding.bias)

    for part in (transformer.adaln_single, transformer.caption_projection):
        for module in part.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)

    for block in transformer.transformer_blocks:
        _zero(block.attn2.to_out[0].weight)
    _zero(transformer.proj_out.weight)
    for name, parameter in transformer.named_parameters():
        if name.endswith("rel_pos_bias"):
            _zero(parameter)


def _zero(parameter: nn.Parameter | None) -> None:
    if parameter is not None:
        nn.init.zeros_(parameter)
