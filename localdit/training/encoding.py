"""From captions to text states, at each step or ahead of training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from localdit.core.text import TextSpace

# Captions to text states (B, L, C) and a mask (B, L), 1 where there is a token.
EncodeCaptions = Callable[[Sequence[str]], tuple[torch.Tensor, torch.Tensor]]

ENCODING_BATCH_SIZE = 32


class CaptionEncoder:
    """Captions to the text encoder's last hidden states, cut at `max_length` tokens."""

    def __init__(self, tokenizer: Any, text_encoder: Any, max_length: int) -> None:
        self.text = TextSpace(tokenizer, text_encoder)
        self.max_length = max_length

    def __call__(self, captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode captions together; see `TextSpace.encode_batch`."""
        return self.text.encode_batch(captions, self.max_length)

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """Return the number of tokens of each caption, after it is cut."""
        return self.text.count_tokens(captions, self.max_length)


def encode_captions(encode: EncodeCaptions, captions: Iterable[str]) -> dict[str, torch.Tensor]:
    """Encode captions to the states of their tokens, (tokens, C) bfloat16, on the CPU.

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
