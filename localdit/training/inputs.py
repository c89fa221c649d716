"""From a batch of data to what the transformer is called with."""

from __future__ import annotations

from typing import NamedTuple

import torch

from localdit.training.components import Encoders
from localdit.training.data.batches import Batch
from localdit.training.encoding import CaptionEncoder, encode_pictures, pad_text


class Inputs(NamedTuple):
    """Latents, text and conditions of a batch, on the training device.

    Attributes:
        latents: (B, C, h, w) float32, without noise.
        text: (B, L, channels) float32.
        text_mask: (B, L), 1 where there is a token.
        conditions: "resolution" (B, 2) and "aspect_ratio" (B, 1), or None where the model is not
            conditioned on them.
    """

    latents: torch.Tensor
    text: torch.Tensor
    text_mask: torch.Tensor
    conditions: dict[str, torch.Tensor] | None


class InputMaker:
    """Encodes batches of pictures, and takes encoded ones as they are.

    Args:
        device: where to put the result.
        encoders: for pictures and captions; None for encoded data.
        max_caption_length: text tokens a caption is cut at.
        size_conditions: whether the model is conditioned on the picture's size.
        bf16: encode pictures in bfloat16.
    """

    def __init__(
        self,
        device: torch.device,
        encoders: Encoders | None,
        max_caption_length: int,
        size_conditions: bool,
        bf16: bool = False,
    ) -> None:
        self.device = device
        self.size_conditions = size_conditions
        self.bf16 = bf16
        self.encoders = encoders
        self.encode_captions: CaptionEncoder | None = None
        if encoders is not None:
            self.encode_captions = CaptionEncoder(
                encoders.tokenizer, encoders.text_encoder, max_caption_length
            )

    def __call__(self, batch: Batch) -> Inputs:
        """What the transformer sees of a batch, but for the noise."""
        if batch.pixels is not None:
            assert self.encoders is not None and self.encode_captions is not None
            latents = encode_pictures(self.encoders.vae, batch.pixels, self.bf16)
            text, mask = self.encode_captions(batch.captions)
        else:
            assert batch.latents is not None
            latents = batch.latents
            text, mask = pad_text(batch.text)
        return Inputs(
            latents.to(self.device, torch.float32, non_blocking=True),
            text.to(self.device, torch.float32, non_blocking=True),
            mask.to(self.device, non_blocking=True),
            self._conditions(batch) if self.size_conditions else None,
        )

    def _conditions(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The size of the pictures, as the pipelines tell it to the model."""
        rows = len(batch.ids)
        height, width = batch.size
        resolution = torch.tensor([[float(height), float(width)]], device=self.device)
        ratio = torch.tensor([[width / height]], device=self.device)
        return {
            "resolution": resolution.expand(rows, 2),
            "aspect_ratio": ratio.expand(rows, 1),
        }
