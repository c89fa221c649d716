"""Tensors that are split over processes: full tensors from shards, and shards from full tensors.

A checkpoint holds full tensors under the model's own names, whatever wrote it: one process, DDP,
FSDP2 or DeepSpeed's ZeRO. So it loads into any of them, bit by bit the same.

Functions marked *collective* must be called by all processes together, even where a process gets
nothing back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

# Names that wrappers insert into those of the parameters: torch.compile, activation checkpointing.
WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return the full tensor, on every process, where `tensor` may be a shard. Collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's shard of a tensor, or all of it. Shares the tensor's memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_of(full: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Return the part of a full tensor that this process holds of `parameter`: a view of `full`.

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
            # There are fewer chunks than processes where the dimension is too short for all.
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

    Raises:
        ValueError: as `shard_of` does.
    """
    return _as_sharded(shard_of(full, parameter).to(parameter.device, copy=True), parameter)


def whole_of(shard: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Return the full tensor, on every process, of shards that are split like `parameter`.

    The inverse of `shard_of`. The shard may be on another device than the parameter. Collective.
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
    """Whether this process keeps what is gathered: it is rank 0, or the only one."""
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
    """Whether the model is DeepSpeed's engine. DeepSpeed itself need not be installed."""
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
    """Return full tensors on the CPU, of shards split like the model's parameters. Collective.

    Args:
        shards: by plain parameter name, what this process holds (see `shard_of`), on any device;
            the same names in the same order on every process.
        model: the model, wrapped or not.

    Returns:
        The full tensors on the main process, nothing on the others.
    """
    parameters = dict(named_parameters(model))
    return collect((name, whole_of(shard, parameters[name])) for name, shard in shards.items())


def collect(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Copy full tensors to the CPU of the main process; elsewhere return an empty dict.

    With an iterator that gathers as it goes, each tensor is whole only while it is copied.
    """
    keep = is_main_process()
    collected = {}
    for name, tensor in tensors:
        if keep:
            copy = tensor.detach().to("cpu", copy=True)
            collected[name] = copy.contiguous()
    return collected
