"""An optimizer's state as a checkpoint holds it: full tensors by parameter name, no pickle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from localdit.training.sharding import (
    collect,
    is_deepspeed,
    named_parameters,
    shard_like,
    whole,
)

# Settings that say how an optimizer computes, not what: the ones of the machine at hand stay.
ENGINE_SETTINGS = frozenset({"fused", "foreach", "capturable", "differentiable"})


def optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The state of an optimizer in full, on the CPU. All processes have to call it together.

    Args:
        model: the model, wrapped or not.
        optimizer: the one of its parameters, as Accelerate prepared it or bare.

    Returns:
        Tensors by parameter and entry (`proj_out.weight.exp_avg`), on the main process only; and
        the rest, ready for JSON: "groups", the parameters and settings of each group, and
        "values", `{parameter: {entry: value}}` for what is not a tensor.

    Raises:
        ValueError: if the optimizer has parameters that the model has not, or entries that can't
            be put together from shards, as those of 8-bit optimizers; under DeepSpeed with
            another ZeRO stage than 1 or 2.
    """
    if is_deepspeed(model):
        from localdit.training import zero

        gathered, notes = zero.optimizer_state(model)
        return collect(gathered), notes
    optimizer = bare_optimizer(optimizer)
    groups = named_groups(model, [group["params"] for group in optimizer.param_groups])
    notes = state_notes(groups, optimizer.param_groups)
    tensors: list[tuple[str, torch.Tensor]] = []
    for name, parameter in (pair for group in groups for pair in group.items()):
        for entry, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                require_splittable(name, entry, value, parameter)
                tensors.append((f"{name}.{entry}", value))
            else:
                notes["values"].setdefault(name, {})[entry] = value
    return collect((key, whole(value)) for key, value in tensors), notes


def load_optimizer_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, torch.Tensor],
    notes: Mapping[str, Any],
) -> None:
    """Set what `optimizer_state` gave, on any number of processes; no step is taken for it.

    Learning rates and the other settings of the groups are restored as well, but for those that
    say how to compute (`fused` and its like).

    Args:
        model: the model, wrapped or not.
        optimizer: the one of its parameters, as Accelerate prepared it or bare.
        tensors: full tensors, the same on every process; read one at a time.
        notes: the rest.

    Raises:
        ValueError: if groups, names or shapes differ.
    """
    if is_deepspeed(model):
        from localdit.training import zero

        zero.load_optimizer_state(model, tensors, notes)
        return
    optimizer = bare_optimizer(optimizer)
    groups = named_groups(model, [group["params"] for group in optimizer.param_groups])
    require_same_groups(groups, notes["groups"])
    parameters = {name: parameter for group in groups for name, parameter in group.items()}
    numbers = {name: number for number, name in enumerate(parameters)}
    state: dict[int, dict[str, Any]] = {
        numbers[name]: dict(values) for name, values in notes["values"].items()
    }
    for key, name, entry in split_keys(tensors, parameters):
        placed = _placed(name, entry, tensors[key], parameters[name])
        state.setdefault(numbers[name], {})[entry] = placed
    settings = [
        restored_settings(current, saved["settings"]) | {"params": [numbers[n] for n in group]}
        for current, saved, group in zip(
            optimizer.param_groups, notes["groups"], groups, strict=True
        )
    ]
    optimizer.load_state_dict({"state": state, "param_groups": settings})


def _placed(name: str, entry: str, value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    require_splittable(name, entry, value, parameter)
    if value.shape == parameter.shape:
        return shard_like(value, parameter)
    return value.clone()


def bare_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """PyTorch's optimizer inside Accelerate's wrapper, if there is one."""
    return optimizer.optimizer if hasattr(optimizer, "optimizer") else optimizer


def named_groups(
    model: nn.Module, groups: Sequence[Sequence[torch.Tensor]]
) -> list[dict[str, torch.Tensor]]:
    """The parameters of each group by name.

    Raises:
        ValueError: if a parameter is none of the model's.
    """
    names = {id(parameter): name for name, parameter in named_parameters(model)}
    if any(id(parameter) not in names for group in groups for parameter in group):
        raise ValueError(
            "The optimizer holds parameters that are not the model's. Pass model and optimizer "
            "to the same call of `accelerator.prepare`."
        )
    return [{names[id(parameter)]: parameter for parameter in group} for group in groups]


def state_notes(
    groups: Sequence[Mapping[str, torch.Tensor]], settings: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What of an optimizer's state is not a tensor; "values" are still to be filled in."""
    noted = [
        {
            "params": list(group),
            "settings": {k: _plain(v) for k, v in setting.items() if k != "params"},
        }
        for group, setting in zip(groups, settings, strict=True)
    ]
    return {"groups": noted, "values": {}}


def _plain(value: Any) -> Any:
    """A setting as JSON can hold it: the learning rate may be a tensor."""
    return value.item() if isinstance(value, torch.Tensor) else value


def restored_settings(current: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """A group's settings from JSON, of the types that the present ones have."""
    settings = {name: value for name, value in current.items() if name != "params"}
    for name, value in saved.items():
        if name in ENGINE_SETTINGS:
            continue
        present = settings.get(name)
        if isinstance(present, torch.Tensor):
            value = torch.full_like(present, value)
        settings[name] = tuple(value) if isinstance(value, list) else value
    return settings


def require_same_groups(
    groups: Sequence[Mapping[str, torch.Tensor]], saved: Sequence[Mapping[str, Any]]
) -> None:
    """Check that the optimizer has the groups that were saved.

    Raises:
        ValueError: if their number or their parameters differ.
    """
    present = [set(group) for group in groups]
    expected = [set(group["params"]) for group in saved]
    if present == expected:
        return
    differing = sorted(set().union(*present) ^ set().union(*expected))
    raise ValueError(
        f"The saved optimizer has groups of {[len(names) for names in expected]} parameters, this "
        f"one of {[len(names) for names in present]}; in one of them only: "
        f"{', '.join(differing[:3]) or 'none, they are grouped in another way'}. Resume with the "
        "model and the optimizer options of the run that was saved."
    )


def split_keys(
    tensors: Mapping[str, torch.Tensor], parameters: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, str, str]]:
    """Key, parameter and entry of each tensor.

    Raises:
        ValueError: if there is no such parameter.
    """
    for key in tensors:
        name, _, entry = key.rpartition(".")
        if name not in parameters:
            raise ValueError(f"The optimizer has no parameter {name!r}, as in the state's {key!r}.")
        yield key, name, entry


def require_splittable(name: str, entry: str, value: torch.Tensor, parameter: torch.Tensor) -> None:
    """Check that an entry of a sharded parameter is a number, or a tensor split as it is.

    Raises:
        ValueError: if it is not: what an 8-bit optimizer keeps for blocks of a shard means
            nothing for another shard.
    """
    if not isinstance(parameter, DTensor) or value.dim() == 0:
        return
    if value.shape != parameter.shape:
        raise ValueError(
            f"The optimizer's {entry} of {name} has shape {tuple(value.shape)}, the parameter "
            f"{tuple(parameter.shape)}: such a state can't be split over processes. Use a 32-bit "
            "optimizer under FSDP2, or DDP with the 8-bit one."
        )
