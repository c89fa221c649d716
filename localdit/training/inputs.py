"""From a batch of data to what the transformer is called with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from localdit.core.conditions import size_conditions
from localdit.core.parts import Encoders
from localdit.core.text import pad_states
from localdit.training.data.batches import Batch


class Inputs(NamedTuple):
    """Latents, text and conditions of a batch, on the training device.

    Attributes:
        latents: (B, C, h, w) float32, without noise.
        text: (B, L, channels) float32.
        text_mask: (B, L), 1 = token.
        conditions: the transformer's `added_cond_kwargs`; see `size_conditions`.
    """

    latents: torch.Tensor
    text: torch.Tensor
    text_mask: torch.Tensor
    conditions: dict[str, torch.Tensor | None]


class InputMaker:
    """Encode batches of pictures; pass on batches that were encoded ahead of training.

    Args:
        device: where to put the result.
        encoders: for pictures and captions; None for encoded data.
        max_caption_length: text tokens that a caption is cut at.
        models: those that the inputs are for; they need not be conditioned on picture sizes.
        bf16: encode pictures in bfloat16.
    """

    def __init__(
        self,
        device: torch.device,
        encoders: Encoders | None,
        max_caption_length: int,
        models: Iterable[torch.nn.Module | None],
        bf16: bool = False,
    ) -> None:
        self.device = device
        self.encoders = encoders
        self.max_caption_length = max_caption_length
        # A model that is not conditioned on sizes ignores them.
        self.conditioned = any(
            getattr(model, "use_additional_conditions", False) for model in models
        )
        self.bf16 = bf16

    def __call__(self, batch: Batch) -> Inputs:
        """Return the transformer's inputs for a batch, but for the noise."""
        if batch.pixels is not None:
            assert self.encoders is not None
            latents = self.encoders.latents.encode_pixels(batch.pixels, self.bf16)
            text, mask = self.encoders.text.encode_batch(batch.captions, self.max_caption_length)
        else:
            assert batch.latents is not None
            latents = batch.latents
            text, mask = pad_states(batch.text)
        return Inputs(
            latents.to(self.device, torch.float32, non_blocking=True),
            text.to(self.device, torch.float32, non_blocking=True),
            mask.to(self.device, non_blocking=True),
            size_conditions(self.conditioned, *batch.size, self.device),
        )
