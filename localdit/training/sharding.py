"""Tensors that are split over processes, and the state of a model made whole.

A checkpoint holds full tensors under the model's own names, whatever it was written by: one
process, DDP, FSDP2 or DeepSpeed's ZeRO. So it loads into any other of them, bit by bit the same.

Functions marked *collective* have to be called by all processes together: they take part even
where they get nothing back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

# Names that wrappers put inside those of the parameters: torch.compile, activation checkpointing.
WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor, on every process, where `tensor` may be a shard of it. Collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor: its shard, or all of it. Shares the tensor's memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_of(full: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The part of a full tensor that this process holds of `parameter`: a view of `full`.

    Raises:
        ValueError: if the shapes differ, or the parameter is split in another way than FSDP2's.
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
    """A copy of a full tensor, split and placed as `parameter` is. Keeps the dtype of `full`.

    Every process passes the same `full`; nothing is sent.

    Raises:
        ValueError: as `shard_of` does.
    """
    return _as_sharded(shard_of(full, parameter).to(parameter.device, copy=True), parameter)


def whole_of(shard: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The full tensor, on every process, of which each holds what it holds of `parameter`.

    The inverse of `shard_of`. The shard may lie on another device than the parameter. Collective.
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
    """Whether this process is the one that keeps what is gathered: rank 0, or the only one."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not distributed or torch.distributed.get_rank() == 0


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP, DeepSpeed and torch.compile. FSDP2 wraps nothing: it is the model."""
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
    """A parameter's name without those of wrappers inside it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters as they are placed, under the names they have in the bare model."""
    for name, parameter in unwrap(model).named_parameters():
        yield plain_name(name), parameter


def trained_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Those of the parameters that are not frozen."""
    return ((name, p) for name, p in named_parameters(model) if p.requires_grad)


def gather_shards(shards: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Full tensors on the CPU of shards that are split as the model's parameters are. Collective.

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
    """Copies on the CPU of full tensors, on the main process; elsewhere an empty dict.

    With an iterator that gathers as it goes, each tensor is whole only while it is copied.
    """
    keep = is_main_process()
    collected = {}
    for name, tensor in tensors:
        if keep:
            copy = tensor.detach().to("cpu", copy=True)
            collected[name] = copy.contiguous()
    return collected


def model_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The full weights and persistent buffers on the CPU, under plain names. Collective.

    Frozen weights are left out: they are where they came from. The others are copies: training may
    go on while they are written. Under DeepSpeed they are the float32 weights that the optimizer
    works on, not their rounded ones.

    Returns:
        The state on the main process, nothing on the others.

    Raises:
        ValueError: under DeepSpeed with another ZeRO stage than 1 or 2.
    """
    return collect(_whole_weights(model))


def _whole_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    masters = {}
    if is_deepspeed(model):
        from localdit.training import zero

        masters = zero.masters(model)
    for name, tensor in _trained_state(model).items():
        yield name, masters[name]() if name in masters else whole(tensor)


def _trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights and buffers as they are placed, but for frozen ones."""
    frozen = {name for name, p in named_parameters(model) if not p.requires_grad}
    state = {plain_name(name): tensor for name, tensor in unwrap(model).state_dict().items()}
    return {name: tensor for name, tensor in state.items() if name not in frozen}


@torch.no_grad()
def load_model_state(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Set weights and buffers from what `model_state` gave, in place, on any number of processes.

    Args:
        model: the model, wrapped or not.
        state: full tensors, the same on every process; read one at a time, so that a mapping
            that reads from a file takes little memory.

    Raises:
        ValueError: if names or shapes differ; nothing is changed then where names differ.
    """
    targets = _trained_state(model)
    require_same_names("the model", set(targets), set(state))
    for name, target in targets.items():
        try:
            local(target).copy_(shard_of(state[name], target))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    if is_deepspeed(model):
        from localdit.training import zero

        zero.load_masters(model, state)


def require_same_names(what: str, expected: set[str], given: set[str]) -> None:
    """Check that a state is of this model.

    Raises:
        ValueError: if names are missing or unknown, naming some.
    """
    if expected == given:
        return
    missing, unknown = sorted(expected - given), sorted(given - expected)
    raise ValueError(
        f"The state of {what} does not fit: {len(missing)} names are missing "
        f"({', '.join(missing[:3]) or 'none'}), {len(unknown)} are unknown "
        f"({', '.join(unknown[:3]) or 'none'}). Load it into the model it was saved from."
    )
