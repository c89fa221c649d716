"""The text that the denoiser is given: with or without the negative prompts, without padding."""

from __future__ import annotations

from typing import Any

import torch

# Text is cut to a multiple of this many tokens: few lengths to compile for, and rows of masks that
# fast attention kernels accept.
TOKEN_MULTIPLE = 8


def shorten(embeds: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut the tokens off that are padding in every row; attention gives them no weight.

    The transformer adds -10000 to the logits of padding, whose exponential is 0 in every dtype. A
    row of padding alone would weigh its tokens equally; where there is one, nothing is cut.

    Args:
        embeds: `(B, L, C)`.
        mask: `(B, L)`, 0 = padding.
    """
    kept = mask != 0
    if not kept.any(dim=1).all():
        return embeds, mask
    last = int(kept.any(dim=0).nonzero().max()) + 1
    length = -(-last // TOKEN_MULTIPLE) * TOKEN_MULTIPLE
    return embeds[:, :length].contiguous(), mask[:, :length].contiguous()


class DenoiserText:
    """Joins and shortens embeddings, again only when one of them has changed."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget the latest, and what it holds in memory."""
        self._made_from: list[tuple[torch.Tensor, int]] = []
        self._made: Any = None

    def __call__(self, *pairs: tuple[torch.Tensor, torch.Tensor]) -> tuple[Any, Any]:
        """Embeddings `(sum of B, L, C)` and mask `(sum of B, L)` of pairs of them, in order."""
        tensors = [tensor for pair in pairs for tensor in pair]
        if any(tensor.is_inference() for tensor in tensors):  # these do not count their changes
            return self._join(pairs)
        same = len(tensors) == len(self._made_from) and all(
            tensor is known and tensor._version == version
            for tensor, (known, version) in zip(tensors, self._made_from, strict=True)
        )
        if not same:
            self._made_from = [(tensor, tensor._version) for tensor in tensors]
            self._made = self._join(pairs)
        return self._made

    @staticmethod
    def _join(pairs: tuple[tuple[torch.Tensor, torch.Tensor], ...]) -> tuple[Any, Any]:
        embeds, masks = zip(*pairs, strict=True)
        return shorten(torch.cat(embeds), torch.cat(masks))


def guided_steps(interval: tuple[float, float], steps: int) -> range:
    """The steps, of `steps`, that are guided: from `int(start * steps)` to `int(stop * steps)`."""
    start, stop = interval
    return range(int(start * steps), int(stop * steps))
