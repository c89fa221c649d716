"""A model in training with its optimizer and its average: what is saved of it, and restored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from localdit.training import sharding, zero
from localdit.training.optimizer_state import load_optimizer_state, optimizer_state
from localdit.training.sharding import local

Tensors = dict[str, torch.Tensor]


class ExponentialMovingAverage:
    """Averages, in float32, of the parameters of a model in training.

    At update n the decay is `min(decay, (1 + n) / (10 + n))`, so the average forgets the random
    start, and short runs end as well as long ones. Of a sharded model each process averages its
    shards.

    Attributes:
        averages: the average of each parameter (this process's shard of it), by name.
        updates: number of calls of `update`.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, torch.Tensor]],
        decay: float,
        device: torch.device | str | None = None,
    ) -> None:
        """Start from the parameters as they are.

        Args:
            parameters: names and parameters, as `named_parameters` yields them.
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
        """Move the averages towards the present parameters."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        current = dict(parameters)
        weights = [
            local(current[name]).detach().to(average.device, torch.float32)
            for name, average in self.averages.items()
        ]
        torch._foreach_lerp_(list(self.averages.values()), weights, 1 - decay)


@dataclass
class TrainedModel:
    """A model in training.

    Attributes:
        module: the model as Accelerate prepared it.
        optimizer: its optimizer, as Accelerate prepared it.
        average: the average of the weights that are trained; None if none is kept.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    average: ExponentialMovingAverage | None = None

    def update_average(self) -> None:
        """Move the average, if there is one, towards the weights after a step."""
        if self.average is not None:
            self.average.update(sharding.named_parameters(self.module))

    def averaged_weights(self) -> Tensors:
        """Return the averaged weights in full, on every process. Collective.

        Frozen weights, and all weights of a model without an average, are returned as they are.
        Nothing is copied where nothing is sharded.
        """
        averages = self._shards()
        return {
            name: sharding.whole_of(averages[name], parameter)
            if name in averages
            else sharding.whole(parameter.detach())
            for name, parameter in sharding.named_parameters(self.module)
        }

    def gathered_average(self) -> Tensors:
        """Return the averages of the trained weights, in full, on the main process. Collective.

        For a model without an average, these are copies of the weights.
        """
        return sharding.gather_shards(self._shards(), self.module)

    def _shards(self) -> Mapping[str, torch.Tensor]:
        if self.average is not None:
            return self.average.averages
        return {
            name: local(parameter).detach()
            for name, parameter in sharding.trained_parameters(self.module)
        }

    def state(self) -> tuple[Tensors, Tensors, dict[str, Any]]:
        """Gather weights, the optimizer's tensors, and the rest ready for JSON. Collective.

        The tensors are complete on the main process only.
        """
        tensors, groups = optimizer_state(self.module, self.optimizer)
        updates = self.average.updates if self.average is not None else None
        return model_state(self.module), tensors, {"ema_updates": updates, "optimizer": groups}

    def load_state(
        self, weights: Tensors, optimizer: Tensors, average: Tensors, notes: Mapping[str, Any]
    ) -> None:
        """Set what `state` and `gathered_average` returned, on any number of processes.

        Raises:
            ValueError: if it is the state of another model or optimizer.
        """
        load_model_state(self.module, weights)
        load_optimizer_state(self.module, self.optimizer, optimizer, notes["optimizer"])
        if self.average is None:
            return
        parameters = dict(sharding.named_parameters(self.module))
        for name, shard in self.average.averages.items():
            shard.copy_(sharding.shard_of(average[name], parameters[name]))
        # A run that kept no average before starts one from the weights.
        self.average.updates = notes["ema_updates"] or 0


def model_state(model: nn.Module) -> Tensors:
    """Return the full weights and persistent buffers on the CPU, by plain name. Collective.

    Frozen weights are left out: they can be loaded from where they came from. The others are
    copies, so training may continue while they are written. Under DeepSpeed they are the float32
    weights that the optimizer works on, not the rounded ones.

    Returns:
        The state on the main process, nothing on the others.

    Raises:
        ValueError: under DeepSpeed with another ZeRO stage than 1 or 2.
    """
    return sharding.collect(_whole_weights(model))


def _whole_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    masters = zero.masters(model) if sharding.is_deepspeed(model) else {}
    for name, tensor in sharding.trained_state(model).items():
        yield name, masters[name]() if name in masters else sharding.whole(tensor)


@torch.no_grad()
def load_model_state(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Set weights and buffers in place to what `model_state` returned, on any number of processes.

    Args:
        model: the model, wrapped or not.
        state: full tensors, the same on every process; read one at a time, so that a mapping
            that reads from a file takes little memory.

    Raises:
        ValueError: if names or shapes differ. Where names differ, nothing is changed.
    """
    targets = sharding.trained_state(model)
    missing, unknown = sorted(targets.keys() - state.keys()), sorted(state.keys() - targets.keys())
    if missing or unknown:
        raise ValueError(
            f"The state of the model does not fit: {len(missing)} names are missing "
            f"({', '.join(missing[:3]) or 'none'}), {len(unknown)} are unknown "
            f"({', '.join(unknown[:3]) or 'none'}). Load it into the model it was saved from."
        )
    for name, target in targets.items():
        try:
            local(target).copy_(sharding.shard_of(state[name], target))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    if sharding.is_deepspeed(model):
        zero.load_masters(model, state)
