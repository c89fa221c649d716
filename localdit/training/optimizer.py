"""The optimizer, the learning rate of each step, and the state as a checkpoint holds it.

A state consists of full tensors by parameter name and of JSON, without pickles.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from localdit.training.sharding import (
    collect,
    is_deepspeed,
    load_zero_optimizer_entries,
    named_parameters,
    shard_like,
    whole,
    zero_optimizer,
    zero_optimizer_entries,
)

# Settings that are not restored: those of the machine, which do not change the result, and an
# option that may change when a run resumes. The learning rate is set before each step.
PRESENT_SETTINGS = frozenset({"fused", "foreach", "capturable", "differentiable", "weight_decay"})


def make_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]],
    name: str,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    device: torch.device | str = "cpu",
) -> torch.optim.Optimizer:
    """Return an optimizer of all parameters.

    Args:
        parameters: names and parameters to train, as `trained_parameters` yields them.
        name: "adamw" (Loshchilov & Hutter, 2019); "adamw8bit", whose two moments take a quarter of
            the memory (Dettmers et al., 2022; parameters of fewer than 4096 values keep theirs in
            float32); or "muon" for the matrices of the blocks, with AdamW for the others, and for
            all if there are none.
        learning_rate: the rate of the first step.
        weight_decay: share of a weight, times the learning rate, that each step subtracts.
        betas: decay of the first and the second moment of AdamW.
    """
    fused = torch.device(device).type in ("cpu", "cuda")
    if name == "muon":
        from localdit.training.muon import MuonWithAdamW, matrices_in

        parameters = list(parameters)
        if any(matrices_in(*pair) for pair in parameters):
            return MuonWithAdamW(parameters, learning_rate, weight_decay, betas, fused)
    trained = [parameter for _, parameter in parameters]
    settings: dict[str, Any] = {"lr": learning_rate, "betas": betas, "weight_decay": weight_decay}
    if name == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(trained, **settings)
    return torch.optim.AdamW(trained, fused=fused, **settings)


def learning_rate(
    step: int,
    total_steps: int,
    peak: float,
    warmup_steps: int = 0,
    schedule: str = "constant",
) -> float:
    """Return the learning rate of one step.

    `peak * step / warmup_steps` during the warm-up, so its first step has a rate of 0. Then `peak`
    ("constant"), or `peak * (1 + cos(pi * p)) / 2` ("cosine"; Loshchilov & Hutter, 2017, eq. 5)
    where p goes from 0 at the end of the warm-up to 1 at `total_steps`.

    Args:
        step: the coming step, counted from 0.
        total_steps: steps of the run, or of its stage.
        schedule: the rate after the warm-up, "constant" or "cosine".
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    if schedule == "constant":
        return peak
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return peak * (1 + math.cos(math.pi * progress)) / 2


def optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Gather the full state of an optimizer on the CPU. Collective.

    Args:
        model: the model, wrapped or not.
        optimizer: the optimizer of its parameters, as Accelerate prepared it or bare.

    Returns:
        Tensors by parameter and entry (`proj_out.weight.exp_avg`), on the main process only; and
        the rest, ready for JSON: "groups", the parameters and settings of each group, and
        "values", `{parameter: {entry: value}}` for entries that are not tensors.
    """
    optimizer, groups = _named_groups(model, optimizer)
    saved = [
        {
            "params": list(group),
            "settings": {  # the learning rate may be a tensor
                name: value.item() if isinstance(value, torch.Tensor) else value
                for name, value in settings.items()
                if name != "params"
            },
        }
        for group, settings in zip(groups, optimizer.param_groups, strict=True)
    ]
    values: dict[str, dict[str, Any]] = {}
    if is_deepspeed(model):
        tensors = zero_optimizer_entries(model, groups, values)
    else:
        tensors = _entries(groups, optimizer, values)
    return collect(tensors), {"groups": saved, "values": values}


def _entries(
    groups: Sequence[Mapping[str, torch.Tensor]],
    optimizer: torch.optim.Optimizer,
    values: dict[str, dict[str, Any]],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the full tensors; put entries that are not tensors into `values` first."""
    tensors: list[tuple[str, torch.Tensor]] = []
    for name, parameter in (pair for group in groups for pair in group.items()):
        for entry, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                require_splittable(name, entry, value, parameter)
                tensors.append((f"{name}.{entry}", value))
            else:
                values.setdefault(name, {})[entry] = value
    return ((key, whole(value)) for key, value in tensors)


def load_optimizer_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, torch.Tensor],
    notes: Mapping[str, Any],
) -> None:
    """Set the state that `optimizer_state` returned, on any number of processes.

    No step is taken. Learning rates and the other settings of the groups are also restored, except
    for `PRESENT_SETTINGS`.

    Args:
        model: the model, wrapped or not.
        optimizer: the optimizer of its parameters, as Accelerate prepared it or bare.
        tensors: full tensors, the same on every process; read one at a time.
        notes: groups and values.
    """
    optimizer, groups = _named_groups(model, optimizer)
    _require_same_groups(groups, notes["groups"])
    parameters = {name: parameter for group in groups for name, parameter in group.items()}
    keys = list(_split_keys(tensors, parameters))
    settings = [
        _restored_settings(current, saved["settings"])
        for current, saved in zip(optimizer.param_groups, notes["groups"], strict=True)
    ]
    if is_deepspeed(model):
        load_zero_optimizer_entries(model, groups, tensors, keys, notes["values"], settings)
        return
    numbers = {name: number for number, name in enumerate(parameters)}
    state: dict[int, dict[str, Any]] = {
        numbers[name]: dict(values) for name, values in notes["values"].items()
    }
    for key, name, entry in keys:
        value, parameter = tensors[key], parameters[name]
        require_splittable(name, entry, value, parameter)
        split = value.shape == parameter.shape
        placed = shard_like(value, parameter) if split else value.clone()
        state.setdefault(numbers[name], {})[entry] = placed
    numbered = [
        values | {"params": [numbers[name] for name in group]}
        for values, group in zip(settings, groups, strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": numbered})


def _named_groups(
    model: nn.Module, optimizer: Any
) -> tuple[torch.optim.Optimizer, list[dict[str, torch.Tensor]]]:
    """Return PyTorch's optimizer inside the wrappers, and the parameters of each group by name."""
    if is_deepspeed(model):
        engine = zero_optimizer(model)
        optimizer, groups = engine.optimizer, engine.bit16_groups
    else:
        optimizer = optimizer.optimizer if hasattr(optimizer, "optimizer") else optimizer
        groups = [group["params"] for group in optimizer.param_groups]
    names = {id(parameter): name for name, parameter in named_parameters(model)}
    if any(id(parameter) not in names for group in groups for parameter in group):
        raise ValueError(
            "The optimizer holds parameters that are not the model's. Pass model and optimizer "
            "to the same call of `accelerator.prepare`."
        )
    named = [{names[id(parameter)]: parameter for parameter in group} for group in groups]
    return optimizer, named


def _restored_settings(current: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group's settings from JSON, with the types of the present ones."""
    settings = {name: value for name, value in current.items() if name != "params"}
    for name, value in saved.items():
        if name in PRESENT_SETTINGS:
            continue
        present = settings.get(name)
        if isinstance(present, torch.Tensor):
            value = torch.full_like(present, value)
        settings[name] = tuple(value) if isinstance(value, list) else value
    return settings


def _require_same_groups(
    groups: Sequence[Mapping[str, torch.Tensor]], saved: Sequence[Mapping[str, Any]]
) -> None:
    """Raise ValueError unless the optimizer has the groups that were saved."""
    present = [set(group) for group in groups]
    expected = [set(group["params"]) for group in saved]
    if present == expected:
        return
    differing = sorted(set().union(*present) ^ set().union(*expected))
    raise ValueError(
        f"The saved optimizer has groups of {[len(names) for names in expected]} parameters, this "
        f"one of {[len(names) for names in present]}; parameters in only one of them: "
        f"{', '.join(differing[:3]) or 'none, the grouping differs'}. Resume with the model and "
        "the optimizer options of the run that was saved."
    )


def _split_keys(
    tensors: Mapping[str, torch.Tensor], parameters: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, str, str]]:
    """Yield key, parameter and entry of each tensor."""
    for key in tensors:
        name, _, entry = key.rpartition(".")
        if name not in parameters:
            raise ValueError(
                f"The saved state has {key!r}, but the optimizer has no parameter {name!r}."
            )
        yield key, name, entry


def require_splittable(name: str, entry: str, value: torch.Tensor, parameter: torch.Tensor) -> None:
    """Check that an entry of a sharded parameter is a number, or a tensor of its shape.

    Raises:
        ValueError: if it is neither. An 8-bit optimizer keeps entries for blocks of one shard,
            which do not apply to another shard.
    """
    if not isinstance(parameter, DTensor) or value.dim() == 0:
        return
    if value.shape != parameter.shape:
        raise ValueError(
            f"The optimizer's {entry} of {name} has shape {tuple(value.shape)}, the parameter "
            f"{tuple(parameter.shape)}: such a state can't be split over processes. Use a 32-bit "
            "optimizer under FSDP2, or DDP with the 8-bit one."
        )
