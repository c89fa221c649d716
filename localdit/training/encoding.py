"""From pictures to latents and from captions to text states, at each step or ahead of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from localdit.pipelines.prompts import preprocess

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import BatchEncoding, PreTrainedTokenizerBase, T5EncoderModel

# Captions to text states (B, L, C) and a mask (B, L), 1 where there is a token.
EncodeCaptions = Callable[[Sequence[str]], tuple[torch.Tensor, torch.Tensor]]
ENCODING_BATCH_SIZE = 32
PAD_MULTIPLE = 8  # tokens


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, pixels: torch.Tensor, bf16: bool = False) -> torch.Tensor:
    """Encode pictures to the posterior's mode, shifted and scaled.

    Args:
        vae: the encoder.
        pixels: (B, 3, H, W) uint8.
        bf16: whether to compute in bfloat16 where that is safe.

    Returns:
        (B, C, H / 8, W / 8) float32, on the VAE's device.
    """
    values = pixels.to(vae.device).to(vae.dtype) / 127.5 - 1.0
    with torch.autocast(vae.device.type, torch.bfloat16, enabled=bf16):
        posterior = vae.encode(values).latent_dist
    latents, config = posterior.mode(), vae.config
    if config.shift_factor is not None:
        latents = latents - config.shift_factor
    if config.latents_mean is not None and config.latents_std is not None:
        mean, std = (
            latents.new_tensor(values).view(1, -1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        latents = (latents - mean) / std
    return (latents * config.scaling_factor).float()


def vae_scale(vae: AutoencoderKL) -> int:
    """Pixels to a latent, along each side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


class CaptionEncoder:
    """Captions to the text encoder's last hidden states, as the pipeline makes them of prompts.

    Captions are cut at `max_length` tokens. A batch is padded to its longest caption: what the mask
    leaves out changes nothing.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, text_encoder: T5EncoderModel, max_length: int
    ) -> None:
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.max_length = max_length

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self._tokenize(captions, padding="longest", return_tensors="pt").to(
            self.text_encoder.device
        )
        mask = tokens.attention_mask
        return self.text_encoder(tokens.input_ids, attention_mask=mask).last_hidden_state, mask

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """How many tokens each caption comes to, once cut."""
        return [len(ids) for ids in self._tokenize(captions).input_ids] if captions else []

    def _tokenize(self, captions: Sequence[str], **options: Any) -> BatchEncoding:
        texts = [preprocess(caption) for caption in captions]
        return self.tokenizer(texts, max_length=self.max_length, truncation=True, **options)


def encode_captions(encode: EncodeCaptions, captions: Iterable[str]) -> dict[str, torch.Tensor]:
    """Text states of each caption, of the tokens there are: (tokens, C) bfloat16, on the CPU.

    Captions that occur more than once are encoded once, those of similar length together.
    """
    ordered = sorted(set(captions), key=lambda caption: (len(caption), caption))
    text: dict[str, torch.Tensor] = {}
    for start in range(0, len(ordered), ENCODING_BATCH_SIZE):
        batch = ordered[start : start + ENCODING_BATCH_SIZE]
        states, mask = encode(batch)
        states, mask = states.to("cpu", torch.bfloat16), mask.to("cpu", torch.bool)
        text |= {caption: states[row][mask[row]] for row, caption in enumerate(batch)}
    return text


def pad_text(text: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Put text states of different lengths into one batch.

    It is padded with zeros to a multiple of `PAD_MULTIPLE` tokens, so that few shapes occur.

    Args:
        text: B tensors (tokens, C).

    Returns:
        States (B, L, C) and their mask (B, L) int64, 1 where there is a token.
    """
    lengths = torch.tensor([len(states) for states in text])
    longest = -(-int(lengths.max()) // PAD_MULTIPLE) * PAD_MULTIPLE
    padded = text[0].new_zeros(len(text), longest, text[0].shape[1])
    for row, states in zip(padded, text, strict=True):
        row[: len(states)] = states
    mask = torch.arange(longest) < lengths[:, None]
    return padded, mask.long().to(padded.device)
