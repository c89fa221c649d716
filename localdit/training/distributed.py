"""How Accelerate is set up, so that training is the same sum on one process and on many."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from accelerate import Accelerator


DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def make_accelerator(batch_size: int, gradient_clip: float, **options: Any) -> Accelerator:
    """An `Accelerator` for what `accelerate launch`, its configuration or torchrun asked for.

    What differs from Accelerate's own settings, and why:

    - Without a GPU, several processes find each other (they would each train alone), and FSDP2
      and DeepSpeed work there as well.
    - DDP keeps the layout of its buckets. It would change after a process's first step, and with
      it the last bits of a sum over three or more processes: those of a resumed run would differ.
    - FSDP2 leaves inputs, weights and sums of gradients in float32; `prepare` adds autocast, as
      elsewhere. Its own casts would round timesteps and sizes as well.
    - DeepSpeed clips at `gradient_clip`, and skips a step whose gradient is not finite
      (`accelerator.optimizer_step_was_skipped`). It divides no loss by the number of
      accumulated batches: see `loss_divisor`.

    Args:
        batch_size: samples of a forward pass on one process.
        gradient_clip: largest norm of the gradient; only DeepSpeed has to know it beforehand.
        **options: arguments of `Accelerator`.

    Raises:
        RuntimeError: if the processes that were started don't find each other.
        ValueError: with FSDP's first version.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.utils import InitProcessGroupKwargs

    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    on_cpu = world_size > 1 and not _has_accelerator()
    deepspeed = _asked_for("DEEPSPEED")
    handlers: list[Any] = [
        # Of two processes the sum is the same in any layout.
        DistributedDataParallelKwargs(
            broadcast_buffers=False, find_unused_parameters=world_size > 2
        )
    ]
    if on_cpu and deepspeed:
        os.environ.pop("ACCELERATE_USE_CPU", None)  # with it, Accelerate leaves DeepSpeed out
        handlers.append(InitProcessGroupKwargs(backend="gloo"))
    accelerator = Accelerator(cpu=on_cpu and not deepspeed, kwargs_handlers=handlers, **options)
    if accelerator.num_processes != world_size:
        raise RuntimeError(
            f"{world_size} processes were started, but this one sees {accelerator.num_processes}: "
            "each would train alone. Start them by `accelerate launch` or torchrun with the same "
            "environment everywhere."
        )
    if deepspeed:
        _configure_deepspeed(accelerator, batch_size, gradient_clip)
    elif _asked_for("FSDP") and world_size > 1:
        _configure_fsdp(accelerator)
    return accelerator


def _has_accelerator() -> bool:
    """Whether there is a GPU or its like that training may use."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return False
    return torch.accelerator.is_available()


def _asked_for(engine: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{engine}", "").lower() in ("1", "true", "yes")


def _configure_fsdp(accelerator: Accelerator) -> None:
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    state = accelerator.state
    if state.distributed_type != DistributedType.FSDP:  # on the CPU, Accelerate falls back to DDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        state.distributed_type = DistributedType.FSDP
    plugin = state.fsdp_plugin
    if getattr(plugin, "fsdp_version", 1) != 2:
        raise ValueError(
            "FSDP's first version is not supported. Set `fsdp_version: 2` in Accelerate's "
            "configuration, as in recipes/accelerate/fsdp2.yaml; Accelerate 1.0 is too old for it."
        )
    plugin.mixed_precision_policy = MixedPrecisionPolicy(cast_forward_inputs=False)


def _configure_deepspeed(accelerator: Accelerator, batch_size: int, clip: float) -> None:
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    config["train_micro_batch_size_per_gpu"] = batch_size
    config["gradient_accumulation_steps"] = 1  # stages may differ; Accelerate says when to step
    config["gradient_clipping"] = clip
    if config.get("bf16", {}).get("enabled") is True:
        config["bf16"]["check_grad_overflow"] = True


def prepare(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """`accelerator.prepare`, with autocast for the engines that Accelerate gives none."""
    dtype = DTYPES.get(accelerator.mixed_precision)
    if dtype is not None and accelerator.distributed_type in ("FSDP", "DEEPSPEED"):
        autocast = torch.autocast(accelerator.device.type, dtype=dtype)
        model.forward = autocast(model.forward)
    return accelerator.prepare(model, optimizer)


def loss_divisor(accelerator: Accelerator) -> int:
    """By what `accelerator.backward` divides a loss: the batches of a step, or nothing."""
    if accelerator.distributed_type == "DEEPSPEED":
        return 1
    return accelerator.gradient_accumulation_steps
