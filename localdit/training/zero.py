"""DeepSpeed's ZeRO stages 1 and 2, whose optimizer works on float32 fragments of the weights.

Each process has the whole (perhaps bfloat16) weights. Of their float32 masters and of the
optimizer's entries it has one contiguous piece of all parameters of a group laid end to end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from localdit.training.sharding import named_parameters

Gather = Callable[[], torch.Tensor]
Groups = Sequence[Mapping[str, torch.Tensor]]  # the parameters of each group, by name


def masters(engine: Any) -> dict[str, Gather]:
    """Return, by parameter name, a function that gathers its float32 weights. Each is collective.

    Raises:
        ValueError: with another ZeRO stage than 1 or 2.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    zero_optimizer(engine)
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

    zero_optimizer(engine)
    for name, parameter in named_parameters(engine):
        if hasattr(parameter, "_hp_mapping"):
            safe_set_full_fp32_param(parameter, state[name].to(parameter.device, torch.float32))


def optimizer_entries(
    engine: Any, groups: Groups, values: dict[str, dict[str, Any]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Gather the optimizer's tensors, each as `parameter.entry`; put the rest into `values`.

    `values` is complete when this returns; the tensors are gathered as the iterator goes.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    optimizer = zero_optimizer(engine)
    split, shared = [], []
    for group, flat in zip(groups, optimizer.single_partition_of_fp32_groups, strict=True):
        for entry, value in optimizer.optimizer.state.get(flat, {}).items():
            for name, parameter in group.items():
                if not isinstance(value, torch.Tensor):
                    values.setdefault(name, {})[entry] = value
                elif value.shape == flat.shape:
                    split.append((name, parameter, entry))
                else:
                    shared.append((f"{name}.{entry}", value))

    def gathered() -> Iterator[tuple[str, torch.Tensor]]:
        yield from shared
        for name, parameter, entry in split:
            yield f"{name}.{entry}", safe_get_full_optimizer_state(parameter, entry)

    return gathered()


def load_optimizer_entries(
    engine: Any,
    groups: Groups,
    tensors: Mapping[str, torch.Tensor],
    keys: Sequence[tuple[str, str, str]],
    values: Mapping[str, Mapping[str, Any]],
    settings: Sequence[Mapping[str, Any]],
) -> None:
    """Set the optimizer's entries and the settings of its groups.

    Args:
        engine: DeepSpeed's.
        groups: the parameters of each group.
        tensors: full tensors.
        keys: key in `tensors`, parameter and entry of each of them.
        values: `{parameter: {entry: value}}` of the entries that are not tensors.
        settings: of each group.

    Raises:
        ValueError: if an entry can't be split.
    """
    from deepspeed.utils import safe_set_full_optimizer_state

    optimizer = zero_optimizer(engine)
    parameters: dict[str, Any] = {name: p for group in groups for name, p in group.items()}
    for number, group in enumerate(groups):
        optimizer.optimizer.param_groups[number].update(settings[number])
        flat = optimizer.single_partition_of_fp32_groups[number]
        state: dict[str, Any] = {}
        for key, name, entry in keys:
            if name in group:
                _make_room(state, entry, tensors[key], group[name], flat)
        for name in group:
            state.update(values.get(name, {}))
        optimizer.optimizer.state[flat] = state
        for name in group:
            fragment = parameters[name]._hp_mapping
            if fragment is not None:  # None where all of it is on other processes
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
    """Add an entry to the state of a group's piece: zeros of its shape, or the entry's number.

    Raises:
        ValueError: if the entry is neither of the parameter's shape nor a number, or the number
            differs within the group.
    """
    if value.shape == parameter.shape:
        if entry not in state:
            state[entry] = torch.zeros_like(flat)
    elif value.dim():
        raise ValueError(
            f"The optimizer's {entry} has shape {tuple(value.shape)} for a parameter of "
            f"{tuple(parameter.shape)}; ZeRO can only split tensors of the parameter's shape."
        )
    elif not torch.equal(state.setdefault(entry, value.clone()), value):
        raise ValueError(
            f"The optimizer's {entry} differs between parameters of a group; under ZeRO they "
            "share it. Resume with DDP or FSDP2."
        )


def zero_optimizer(engine: Any) -> Any:
    """Return the engine's optimizer.

    Raises:
        ValueError: with another ZeRO stage than 1 or 2, the only ones supported.
    """
    stage = engine.zero_optimization_stage()
    if stage not in (1, 2) or not hasattr(engine.optimizer, "single_partition_of_fp32_groups"):
        raise ValueError(
            f"Checkpoints can be written under DeepSpeed's ZeRO stages 1 and 2, not with stage "
            f"{stage} and {type(engine.optimizer).__name__}. Set `zero_stage: 2` in Accelerate's "
            "configuration, or use FSDP2 to split the weights as well."
        )
    return engine.optimizer
