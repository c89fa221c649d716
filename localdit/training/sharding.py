"""Tensors that are split over processes, by FSDP2 or by DeepSpeed's ZeRO.

A checkpoint holds full tensors under the model's own names, whatever wrote it: one process, DDP,
FSDP2 or ZeRO. So it loads into any of them, with the same bits. Functions marked *collective* must
be called by all processes together, even where a process gets nothing back.

The optimizer of ZeRO stages 1 and 2 works on float32 fragments of the weights. Each process holds
all weights, perhaps in bfloat16. Of the float32 masters and of the optimizer's entries it holds one
contiguous piece of a group's parameters laid end to end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

Groups = Sequence[Mapping[str, torch.Tensor]]  # the parameters of each group, by name
# Names that torch.compile and activation checkpointing insert into the names of parameters.
WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Gather the full tensor on every process if `tensor` is a shard. Collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's shard of a tensor, or all of it. Shares the tensor's memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_of(full: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Return the part of `full` that this process holds of a parameter. It is a view.

    Raises:
        ValueError: if the shapes differ, or the parameter is not split as FSDP2 splits it.
    """
    if full.shape != parameter.shape:
        raise ValueError(
            f"A tensor of shape {tuple(full.shape)} does not fit a parameter of shape "
            f"{tuple(parameter.shape)}."
        )
    if not isinstance(parameter, DTensor):
        return full
    mesh = parameter.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None  # a process that trains is part of the mesh
    for dim, placement in enumerate(parameter.placements):
        if type(placement) is Shard:
            chunks = full.chunk(mesh.size(dim), placement.dim)
            rank = coordinate[dim]
            # If the dimension is short, there are fewer chunks than processes.
            empty = full.narrow(placement.dim, 0, 0)
            full = chunks[rank] if rank < len(chunks) else empty
        elif not isinstance(placement, Replicate):
            raise ValueError(
                f"A parameter is placed as {placement}; expected Shard or Replicate, as FSDP2 "
                "places them."
            )
    return full


def shard_like(full: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Return a copy of a full tensor, split and placed like `parameter`, in the dtype of `full`.

    Every process passes the same `full`; nothing is sent.
    """
    return _as_sharded(shard_of(full, parameter).to(parameter.device, copy=True), parameter)


def whole_of(shard: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Gather the full tensor on every process from shards that are split like `parameter`.

    This inverts `shard_of`. The shard may be on another device than the parameter. Collective.
    """
    if not isinstance(parameter, DTensor):
        return shard
    return whole(_as_sharded(shard.to(parameter.device), parameter))


def _as_sharded(shard: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    if not isinstance(parameter, DTensor):
        return shard
    return DTensor.from_local(
        shard.contiguous(),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def is_main_process() -> bool:
    """Return whether this process keeps the gathered tensors: it has rank 0, or is the only one."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not distributed or torch.distributed.get_rank() == 0


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside DDP, DeepSpeed and torch.compile. FSDP2 wraps nothing."""
    inner: Any = model
    while True:
        if isinstance(inner, DistributedDataParallel) or is_deepspeed(inner):
            inner = inner.module
        elif hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        else:
            return inner


def is_deepspeed(model: nn.Module) -> bool:
    """Return whether the model is DeepSpeed's engine. DeepSpeed itself need not be installed."""
    return any(kind.__name__ == "DeepSpeedEngine" for kind in type(model).__mro__)


def plain_name(name: str) -> str:
    """Return a parameter's name without the names of wrappers inside it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters as they are placed, under the names they have in the bare model."""
    for name, parameter in unwrap(model).named_parameters():
        yield plain_name(name), parameter


def trained_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters that are not frozen."""
    return ((name, p) for name, p in named_parameters(model) if p.requires_grad)


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return weights and buffers as they are placed, without the frozen weights."""
    frozen = {name for name, p in named_parameters(model) if not p.requires_grad}
    state = {plain_name(name): tensor for name, tensor in unwrap(model).state_dict().items()}
    return {name: tensor for name, tensor in state.items() if name not in frozen}


def gather_shards(shards: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Gather full tensors on the CPU from shards split like the model's parameters. Collective.

    Args:
        shards: this process's shards (see `shard_of`) by plain parameter name, on any device. All
            processes pass the same names in the same order.
        model: the model, wrapped or not.

    Returns:
        The full tensors on the main process, nothing on the others.
    """
    parameters = dict(named_parameters(model))
    return collect((name, whole_of(shard, parameters[name])) for name, shard in shards.items())


def collect(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Copy full tensors to the CPU of the main process; return nothing on the other processes.

    If the iterator gathers each tensor in turn, only one at a time is whole.
    """
    keep = is_main_process()
    collected = {}
    for name, tensor in tensors:
        if keep:
            collected[name] = tensor.detach().to("cpu", copy=True).contiguous()
    return collected


def model_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gather the full weights and persistent buffers on the CPU, by plain name. Collective.

    Frozen weights are left out, because their source still has them. The others are copies, so
    training may continue while they are written. Under DeepSpeed they are the float32 weights that
    the optimizer works on, not the rounded ones.

    Returns:
        The state on the main process, nothing on the others.
    """
    masters = zero_masters(model) if is_deepspeed(model) else {}
    return collect(
        (name, masters[name]() if name in masters else whole(tensor))
        for name, tensor in trained_state(model).items()
    )


@torch.no_grad()
def load_model_state(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Load in place what `model_state` returned, on any number of processes.

    Args:
        model: the model, wrapped or not.
        state: full tensors, the same on every process; read one at a time, so that a mapping
            that reads from a file takes little memory.

    Raises:
        ValueError: if names or shapes differ. Where names differ, nothing is changed.
    """
    targets = trained_state(model)
    missing, unknown = sorted(targets.keys() - state.keys()), sorted(state.keys() - targets.keys())
    if missing or unknown:
        raise ValueError(
            f"The state of the model does not fit: {len(missing)} names are missing "
            f"({', '.join(missing[:3]) or 'none'}), {len(unknown)} are unknown "
            f"({', '.join(unknown[:3]) or 'none'}). Load it into the model it was saved from."
        )
    for name, target in targets.items():
        try:
            local(target).copy_(shard_of(state[name], target))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    if is_deepspeed(model):
        load_zero_masters(model, state)


def zero_masters(engine: Any) -> dict[str, Callable[[], torch.Tensor]]:
    """Return the functions that gather float32 weights, by parameter name. Each is collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    zero_optimizer(engine)
    return {
        name: partial(safe_get_full_fp32_param, parameter)
        for name, parameter in named_parameters(engine)
        if hasattr(parameter, "_hp_mapping")
    }


def load_zero_masters(engine: Any, state: Mapping[str, torch.Tensor]) -> None:
    """Load the float32 weights; the engine's own have been loaded already."""
    from deepspeed.utils import safe_set_full_fp32_param

    zero_optimizer(engine)
    for name, parameter in named_parameters(engine):
        if hasattr(parameter, "_hp_mapping"):
            safe_set_full_fp32_param(parameter, state[name].to(parameter.device, torch.float32))


def zero_optimizer_entries(
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


def load_zero_optimizer_entries(
    engine: Any,
    groups: Groups,
    tensors: Mapping[str, torch.Tensor],
    keys: Sequence[tuple[str, str, str]],
    values: Mapping[str, Mapping[str, Any]],
    settings: Sequence[Mapping[str, Any]],
) -> None:
    """Load the optimizer's entries and the settings of its groups.

    Args:
        tensors: full tensors.
        keys: key in `tensors`, parameter and entry of each tensor.
        values: `{parameter: {entry: value}}` of the entries that are not tensors.
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
    """Add an entry to the state of a group's piece: zeros of its shape, or the entry's number."""
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
            "configuration, or use FSDP2, which also splits the weights."
        )
    return engine.optimizer
