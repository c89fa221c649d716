"""From pictures to latents and from captions to text states, at each step or ahead of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from localdit.pipelines.prompts import preprocess
from localdit.training.data_old import PictureDataset

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import BatchEncoding, PreTrainedTokenizerBase, T5EncoderModel

# Captions to text states (B, L, C) and a mask (B, L), 1 where there is a token.
EncodeCaptions = Callable[[Sequence[str]], tuple[torch.Tensor, torch.Tensor]]
ENCODING_BATCH_SIZE = 32
PAD_MULTIPLE = 8  # tokens


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, pixels: torch.Tensor, bf16: bool = False) -> torch.Tensor:
    """Pictures to the posterior's mode, scaled.

    Args:
        vae: the encoder.
        pixels: (B, 3, H, W) uint8.
        bf16: whether to compute in bfloat16 where that is safe.

    Returns:
        (B, C, H / 8, W / 8) float32, on the VAE's device.
    """
    values = pixels.to(vae.device).to(vae.dtype)
    if pixels.dtype == torch.uint8:
        values = values / 127.5 - 1.0
    with torch.autocast(vae.device.type, torch.bfloat16, enabled=bf16):
        posterior = vae.encode(values).latent_dist
    return (posterior.mode() * vae.config.scaling_factor).float()


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


class CaptionCache:
    """Text states of a fixed set of captions, kept in memory: those of the tokens there are.

    The processes encode a share each. Batches are padded to a multiple of `PAD_MULTIPLE` tokens, so
    that few shapes occur.
    """

    PAD_MULTIPLE = 8

    def __init__(
        self, captions: Iterable[str], encode: EncodeCaptions, rank: int = 0, num_processes: int = 1
    ) -> None:
        # Sorted by length, a batch needs little padding; dealt out in turn, shares weigh the same.
        ordered = sorted(set(captions), key=lambda caption: (len(caption), caption))
        shares = [ordered[process::num_processes] for process in range(num_processes)]
        self.row = {caption: row for row, caption in enumerate(chain(*shares))}

        states, lengths = [], []
        starts = range(0, len(shares[rank]), ENCODING_BATCH_SIZE)
        for start in tqdm(starts, "Encoding captions", disable=rank > 0):
            encoded, mask = encode(shares[rank][start : start + ENCODING_BATCH_SIZE])
            states.append(encoded[mask.bool()].cpu())
            lengths.append(mask.sum(dim=1).cpu())
        self.states = torch.cat(gather_object(states))  # (all tokens, C)
        self.lengths = torch.cat(gather_object(lengths))  # (captions,)
        self.starts = self.lengths.cumsum(0) - self.lengths

    def __call__(self, captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.tensor([self.row[caption] for caption in captions])
        lengths = self.lengths[rows]
        longest = -(-int(lengths.max()) // self.PAD_MULTIPLE) * self.PAD_MULTIPLE
        position = torch.arange(longest)
        mask = position < lengths[:, None]  # (B, L)
        token = (self.starts[rows, None] + position).where(mask, 0)
        return self.states[token] * mask[..., None], mask.long()


class LatentCache(Dataset[tuple[int, torch.Tensor]]):
    """Latents of all pictures, kept in memory, with their indices.

    The processes encode a share each.
    """

    def __init__(
        self,
        pictures: PictureDataset,
        vae: AutoencoderKL,
        num_workers: int,
        bf16: bool = False,
        rank: int = 0,
        num_processes: int = 1,
    ) -> None:
        bounds = [len(pictures) * process // num_processes for process in range(num_processes + 1)]
        share = Subset(pictures, range(bounds[rank], bounds[rank + 1]))
        # On a CPU the activations of a few pictures fit its caches; those of many do not.
        batch_size = 2 if vae.device.type == "cpu" else ENCODING_BATCH_SIZE
        loader = DataLoader(share, batch_size, num_workers=num_workers)
        batches = tqdm(loader, "Encoding pictures", disable=rank > 0)
        latents = [encode_pictures(vae, pixels, bf16).cpu() for _, pixels in batches]
        self.latents = torch.cat(gather_object(latents))

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        return index, self.latents[index]
