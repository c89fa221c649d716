"""The weights a new LocalDiT transformer starts training from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from localdit.models.transformer import LocalDiTTransformer2DModel


@torch.no_grad()
def initialize_weights(transformer: LocalDiTTransformer2DModel) -> None:
    """Initialise a new transformer in place, as DiT (Peebles & Xie, 2023) and PixArt are.

    Linear layers are Xavier-uniform with zero bias, and so is the patch embedding, a convolution
    that acts as one. The embeddings of time and size, the AdaLN layer and the caption projection
    start with weights of standard deviation 0.02. Cross-attention's output, the output layer and
    the relative position biases start at zero: the untrained model predicts zero, and ignores the
    text. Everything else stays as it was constructed.
    """
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    patches = transformer.pos_embed.proj
    nn.init.xavier_uniform_(patches.weight.flatten(1))
    assert patches.bias is not None
    nn.init.zeros_(patches.bias)

    for name, parameter in transformer.named_parameters():
        if name.startswith(("adaln_single.", "caption_projection.")) and name.endswith(".weight"):
            nn.init.normal_(parameter, std=0.02)
        if name.endswith(("attn2.to_out.0.weight", "rel_pos_bias")):
            nn.init.zeros_(parameter)
    nn.init.zeros_(transformer.proj_out.weight)
