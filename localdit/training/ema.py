"""Exponential moving average of a model's weights."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch

Model = TypeVar("Model", bound=torch.nn.Module)


class ExponentialMovingAverage(Generic[Model]):
    """A second model whose weights trail those of the one being trained.

    At update n the decay is `min(decay, (1 + n) / (10 + n))`, so that the average forgets the
    random start: short runs come out as good as long ones.

    Attributes:
        model: the averaged copy, in evaluation mode and without gradients: ready to sample from.
        updates: how often `update` was called.
    """

    def __init__(self, model: Model, decay: float) -> None:
        self.model = copy.deepcopy(model)
        self.model.eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, model: Model) -> None:
        """Move the average towards `model`, which has the weights of the one averaged so far."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averages: list[torch.Tensor] = list(self.model.parameters())
        weights: list[torch.Tensor] = list(model.parameters())
        torch._foreach_lerp_(averages, weights, 1 - decay)
