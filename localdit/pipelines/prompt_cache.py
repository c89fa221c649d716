"""Embeddings of prompts that were encoded before."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Hashable

import torch

MAX_BYTES = 64 * 2**20  # 32 prompts of 120 tokens of FLAN-T5-XXL in float32


class PromptCache:
    """A bounded store of text states in CPU memory; the least recently used go first.

    It holds what one text encoder made, and empties itself as soon as it is shown another one, or
    the same one with other weights, dtype or device. Without a text encoder it goes on serving.

    Args:
        max_bytes: how much to hold; 0 switches the cache off.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self._entries: OrderedDict[Hashable, torch.Tensor] = OrderedDict()
        self._encoder: weakref.ref[torch.nn.Module] | None = None
        self._state: Hashable = None

    def __len__(self) -> int:
        """Number of prompts held."""
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Size of the states held, in bytes."""
        return sum(states.nbytes for states in self._entries.values())

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()

    def serve(self, encoder: torch.nn.Module | None, device: torch.device) -> None:
        """Hold states of `encoder` as it is now, computing on `device`, and of no other.

        With None, what was made by the last one stays.
        """
        if encoder is None:
            return
        state = encoder_state(encoder, device)
        if self._encoder is None or self._encoder() is not encoder or self._state != state:
            self.clear()
        self._encoder, self._state = weakref.ref(encoder), state

    def get(self, key: Hashable) -> torch.Tensor | None:
        """The states `(L, C)` stored under `key`, on the CPU, not to be changed; None if absent."""
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def put(self, key: Hashable, states: torch.Tensor) -> None:
        """Store a copy of states `(L, C)`; what exceeds `max_bytes` by itself is not stored."""
        if states.nbytes > self.max_bytes:
            return
        self._entries[key] = states.detach().to("cpu", copy=True)
        self._entries.move_to_end(key)
        while self.nbytes > self.max_bytes:
            self._entries.popitem(last=False)


def encoder_state(encoder: torch.nn.Module, device: torch.device) -> Hashable:
    """What an encoder's results depend on and can be told at no cost.

    PyTorch counts the changes made to a tensor in place, so optimizer steps, `load_state_dict` and
    adapters show; moving between devices does not count.
    """
    parameters = list(encoder.parameters())
    changes = sum(p._version for p in parameters if not p.is_inference())
    dtypes = tuple(sorted({str(p.dtype) for p in parameters}))
    kind = device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return len(parameters), changes, dtypes, autocast, str(device)
