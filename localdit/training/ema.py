"""Exponential moving average of a model's weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from localdit.training.sharding import local


class ExponentialMovingAverage:
    """Averages, in float32, of the parameters of the model being trained.

    At update n the decay is `min(decay, (1 + n) / (10 + n))`, so that the average forgets the
    random start: short runs come out as good as long ones. Of a sharded model each process averages
    its shards.

    Attributes:
        averages: name to average (this process's shard of it) for each parameter.
        updates: how often `update` was called.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, torch.Tensor]],
        decay: float,
        device: torch.device | str | None = None,
    ) -> None:
        """Start from the parameters as they are.

        Args:
            parameters: names and parameters, as `named_parameters` gives them.
            decay: the share of the average that an update keeps, in the long run.
            device: where the averages are kept; None means beside the parameters.
        """
        self.averages = {
            name: local(parameter).detach().to(device, torch.float32, copy=True)
            for name, parameter in parameters
        }
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Move the averages towards the parameters that they are of."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        current = dict(parameters)
        weights = [
            local(current[name]).detach().to(average.device, torch.float32)
            for name, average in self.averages.items()
        ]
        torch._foreach_lerp_(list(self.averages.values()), weights, 1 - decay)
