"""The text for the denoiser: with or without the negative prompts, without padding."""

from __future__ import annotations

from typing import Any

import torch

from ..core.text import cut_padding


class DenoiserText:
    """Join embeddings and cut their padding, again only when one of them has changed."""

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
        return cut_padding(torch.cat(embeds), torch.cat(masks))


def guided_steps(interval: tuple[float, float], steps: int) -> range:
    """The steps, of `steps`, that are guided: from `int(start * steps)` to `int(stop * steps)`."""
    start, stop = interval
    return range(int(start * steps), int(stop * steps))
