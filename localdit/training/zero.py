"""DeepSpeed's ZeRO stages 1 and 2, whose optimizer works on float32 fragments of the weights.

Each process has the whole (perhaps bfloat16) weights, and of their float32 masters and the
optimizer's entries one contiguous piece of all parameters of a group laid end to end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from localdit.training import optimizer_state as states
from localdit.training.sharding import named_parameters

Gather = Callable[[], torch.Tensor]


def masters(engine: Any) -> dict[str, Gather]:
    """By parameter name, how to gather its float32 weights; each is a collective call.

    Raises:
        ValueError: with another ZeRO stage than 1 or 2.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    _require_stage(engine)
    return {
        name: partial(safe_get_full_fp32_param, parameter)
        for name, parameter in named_parameters(engine)
        if hasattr(parameter, "_hp_mapping")
    }


def load_masters(engine: Any, state: Mapping[str, torch.Tensor]) -> None:
    """Set the float32 weights; the engine's own have been set already.

    Raises:
        ValueError: with another ZeRO stage than 1 or 2.
    """
    from deepspeed.utils import safe_set_full_fp32_param

    _require_stage(engine)
    for name, parameter in named_parameters(engine):
        if hasattr(parameter, "_hp_mapping"):
            safe_set_full_fp32_param(parameter, state[name].to(parameter.device, torch.float32))


def optimizer_state(
    engine: Any,
) -> tuple[Iterator[tuple[str, torch.Tensor]], dict[str, Any]]:
    """As `optimizer_state.optimizer_state`; the tensors are gathered as the iterator goes.

    Raises:
        ValueError: with another ZeRO stage than 1 or 2.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    optimizer = _require_stage(engine)
    groups = states.named_groups(engine, optimizer.bit16_groups)
    notes = states.state_notes(groups, optimizer.optimizer.param_groups)
    split, shared = [], []
    for group, flat in zip(groups, optimizer.single_partition_of_fp32_groups, strict=True):
        for entry, value in optimizer.optimizer.state.get(flat, {}).items():
            for name, parameter in group.items():
                if not isinstance(value, torch.Tensor):
                    notes["values"].setdefault(name, {})[entry] = value
                elif value.shape == flat.shape:
                    split.append((name, parameter, entry))
                else:
                    shared.append((f"{name}.{entry}", value))

    def gathered() -> Iterator[tuple[str, torch.Tensor]]:
        yield from shared
        for name, parameter, entry in split:
            yield f"{name}.{entry}", safe_get_full_optimizer_state(parameter, entry)

    return gathered(), notes


def load_optimizer_state(
    engine: Any, tensors: Mapping[str, torch.Tensor], notes: Mapping[str, Any]
) -> None:
    """As `optimizer_state.load_optimizer_state`.

    Raises:
        ValueError: if groups, names or shapes differ; with another ZeRO stage than 1 or 2.
    """
    from deepspeed.utils import safe_set_full_optimizer_state

    optimizer = _require_stage(engine)
    groups = states.named_groups(engine, optimizer.bit16_groups)
    states.require_same_groups(groups, notes["groups"])
    parameters: dict[str, Any] = {name: p for group in groups for name, p in group.items()}
    keys = list(states.split_keys(tensors, parameters))
    for number, (group, saved) in enumerate(zip(groups, notes["groups"], strict=True)):
        inner = optimizer.optimizer.param_groups[number]
        inner.update(states.restored_settings(inner, saved["settings"]))
        flat = optimizer.single_partition_of_fp32_groups[number]
        state: dict[str, Any] = {}
        for key, name, entry in keys:
            if name in group:
                _make_room(state, entry, tensors[key], group[name], flat)
        for name in group:
            state.update(notes["values"].get(name, {}))
        optimizer.optimizer.state[flat] = state
        for name in group:
            fragment = parameters[name]._hp_mapping
            if fragment is not None:  # None where all of it lies on other processes
                fragment.set_optim_state_fragment(flat, state)
    optimizer._hp_optimizer_states_linked = True
    for key, name, entry in keys:
        if tensors[key].dim():
            value = tensors[key].to(parameters[name].device)
            safe_set_full_optimizer_state(parameters[name], value, entry)


def _make_room(
    state: dict[str, Any],
    entry: str,
    value: torch.Tensor,
    parameter: torch.Tensor,
    flat: torch.Tensor,
) -> None:
    """Give the state of a group's piece an entry like the parameter's: zeros, or its number.

    Raises:
        ValueError: if the entry is neither of the parameter's shape nor a number, or the number
            is not the one of the rest of the group.
    """
    if value.shape == parameter.shape:
        if entry not in state:
            state[entry] = torch.zeros_like(flat)
    elif value.dim():
        raise ValueError(
            f"The optimizer's {entry} has shape {tuple(value.shape)} for a parameter of "
            f"{tuple(parameter.shape)}; ZeRO can only split what has the parameter's shape."
        )
    elif not torch.equal(state.setdefault(entry, value.clone()), value):
        raise ValueError(
            f"The optimizer's {entry} differs between parameters of a group; under ZeRO they "
            "share it. Resume with DDP or FSDP2."
        )


def _require_stage(engine: Any) -> Any:
    """The optimizer of the engine.

    Raises:
        ValueError: with another ZeRO stage than 1 or 2, the only ones handled here.
    """
    stage = engine.zero_optimization_stage()
    if stage not in (1, 2) or not hasattr(engine.optimizer, "single_partition_of_fp32_groups"):
        raise ValueError(
            f"Checkpoints can be written under DeepSpeed's ZeRO stages 1 and 2, not with stage "
            f"{stage} and {type(engine.optimizer).__name__}. Set `zero_stage: 2` in Accelerate's "
            "configuration, or use FSDP2 to split the weights as well."
        )
    return engine.optimizer
