"""Starting from the weights of another model: the report, and new layers for other latents.

Only the patch embedding and the output layer know the channels of the latents and the side of a
patch. For the latents of another autoencoder these two are made new, and everything else is kept.
LiT (arXiv 2501.12976) and DC-Gen (arXiv 2509.25180) show that the rest carries over.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from localdit.checkpoint.loading import empty_model
from localdit.checkpoint.reading import few
from localdit.core.latents import LatentFormat
from localdit.models import LocalDiTTransformer2DModel
from localdit.models.configuration import public_arguments

# The parameters that depend on the latents: patch embedding and output layer.
LATENT_LAYERS = ("pos_embed.proj.", "proj_out.")


@dataclass(frozen=True)
class TransferReport:
    """A report on the weights that a model started from.

    Attributes:
        origin: kind of the other model, "PixArt" or "LocalDiT".
        source: its file or folder.
        copied: names of the parameters that were copied.
        fresh: names of the other parameters of the new model.
        unused: names of the tensors that were not copied, apart from unused blocks.
        blocks: the block that each block was copied from, if their number differs.
        num_source_blocks: number of blocks of the other model.
        notes: further lines.
    """

    origin: str
    source: Path
    copied: tuple[str, ...]
    fresh: tuple[str, ...]
    unused: tuple[str, ...] = ()
    blocks: tuple[int, ...] = ()
    num_source_blocks: int = 0
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return a few lines to print before training."""
        # Names without the numbers of blocks, each once.
        kinds = dict.fromkeys(re.sub(r"^transformer_blocks\.\d+\.", "", n) for n in self.fresh)
        lines = [f"Started from {self.origin}, {self.source}"]
        if self.blocks:
            blocks = ", ".join(map(str, self.blocks))
            lines.append(f"  blocks: {blocks} of 0 to {self.num_source_blocks - 1}")
        lines += [
            f"  copied: {len(self.copied):,} parameters",
            f"  fresh: {len(self.fresh):,} parameters ({', '.join(kinds) or 'none'})",
        ]
        if self.unused:
            lines.append(f"  unused: {few(self.unused)}")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


@torch.no_grad()
def initialize_latent_layers(transformer: LocalDiTTransformer2DModel) -> None:
    """Initialise the patch embedding and the output layer in place.

    The patch embedding, a convolution that acts as a linear layer, is Xavier-uniform with zero
    bias. The output layer is zero, so the model first predicts zero.
    """
    patches = transformer.pos_embed.proj
    nn.init.xavier_uniform_(patches.weight.flatten(1))
    assert patches.bias is not None
    nn.init.zeros_(patches.bias)
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)


def latent_shape(latents: LatentFormat, patch_size: int) -> dict[str, int]:
    """Return the arguments of a transformer that depend on its latents."""
    return {
        "in_channels": latents.channels,
        "out_channels": latents.channels,
        "patch_size": patch_size,
    }


def latent_note(config: Mapping[str, int], pixels_per_latent: int) -> str:
    """Return a line on the latents, tokens and windows of a transformer."""
    token = config["patch_size"] * pixels_per_latent
    window = config["window_size"] * token
    return (
        f"latents: {config['in_channels']} channels, {pixels_per_latent} x {pixels_per_latent} "
        f"pixels each; a token is {token} x {token} pixels, a window {window} x {window}"
    )


def start_from_other_latents(
    trained: LocalDiTTransformer2DModel,
    source: Path,
    latents: LatentFormat,
    patch_size: int,
    image_size: int,
) -> tuple[LocalDiTTransformer2DModel, TransferReport]:
    """Return a LocalDiT for other latents, with all weights that do not depend on the latents.

    The new layers start as `initialize_latent_layers` says. A square picture of `image_size` spans
    the positions that one of the trained model's `sample_size` spanned: `interpolation_scale` is
    set to `(image_size / pixels per latent / patch_size) / positions`.

    Args:
        trained: a LocalDiT of other latents, on the CPU. Its tensors are shared, not copied.
        source: its file or folder, for the report.
        latents: the latents to train on.
        patch_size: side of the square of these latents that becomes a token.
        image_size: side in pixels, a multiple of the pixels per token.
    """
    positions = trained.pos_embed.base_size / trained.pos_embed.interpolation_scale
    sample_size = image_size // latents.pixels_per_latent
    scale = sample_size // patch_size / positions
    config = public_arguments(trained.config)
    config |= latent_shape(latents, patch_size) | {
        "sample_size": sample_size,
        "interpolation_scale": scale,
        "use_additional_conditions": trained.use_additional_conditions,
    }
    transformer = empty_model(LocalDiTTransformer2DModel, **config)
    for layer in (transformer.pos_embed.proj, transformer.proj_out):
        layer.to_empty(device="cpu")
    state = trained.state_dict()
    copied = tuple(name for name in state if not name.startswith(LATENT_LAYERS))
    fresh = tuple(name for name in state if name.startswith(LATENT_LAYERS))
    transformer.load_state_dict({name: state[name] for name in copied}, strict=False, assign=True)
    initialize_latent_layers(transformer)
    before = trained.config
    notes = (
        latent_note(transformer.config, latents.pixels_per_latent),
        f"before: {before.in_channels} channels, tokens of {before.patch_size} x "
        f"{before.patch_size} latents",
        f"positions: a picture of {image_size} x {image_size} pixels spans 0 to {positions:g}, as "
        f"one of {before.sample_size} x {before.sample_size} latents did: interpolation_scale is "
        f"{scale:g}",
    )
    return transformer, TransferReport("LocalDiT", source, copied, fresh, fresh, notes=notes)
