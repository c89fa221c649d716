"""The processes of a run: their setup by Accelerate, and their common decisions.

Training computes the same sums on one process as on many.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object
from torch import nn

from localdit.errors import FieldError
from localdit.training.shutdown import TrainingStopped

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
Result = TypeVar("Result")


def connect(timeout: timedelta | None = None, **options: Any) -> Accelerator:
    """Return an `Accelerator` that joins the processes of `accelerate launch` or torchrun, if any.

    It differs from Accelerate's defaults in these points:

    - Without a GPU, several processes find each other (otherwise each would work alone), also with
      DeepSpeed.
    - DDP keeps the layout of its buckets. By default the layout changes after the first step of a
      process, and with it the last bits of a sum over three or more processes. So a resumed run
      would differ from an uninterrupted one.

    Args:
        timeout: how long the processes wait for each other; None for Accelerate's default.
        **options: arguments of `Accelerator`.

    Raises:
        RuntimeError: if the processes don't find each other.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    on_cpu = world_size > 1 and not _has_accelerator()
    through_gloo = on_cpu and _requested("DEEPSPEED")
    if through_gloo:
        os.environ.pop("ACCELERATE_USE_CPU", None)  # with it, Accelerate leaves DeepSpeed out
    handlers: list[Any] = [
        # A sum over two processes is the same in any layout.
        DistributedDataParallelKwargs(
            broadcast_buffers=False, find_unused_parameters=world_size > 2
        ),
        # "nccl" stands for what suits the machine.
        InitProcessGroupKwargs(backend="gloo" if through_gloo else "nccl", timeout=timeout),
    ]
    accelerator = Accelerator(cpu=on_cpu and not through_gloo, kwargs_handlers=handlers, **options)
    if accelerator.num_processes != world_size:
        raise RuntimeError(
            f"{world_size} processes were started, but this one sees {accelerator.num_processes}, "
            "so each would work alone. Start them with `accelerate launch` or torchrun, with the "
            "same environment everywhere."
        )
    return accelerator


def make_accelerator(batch_size: int, gradient_clip: float, **options: Any) -> Accelerator:
    """Return an `Accelerator` for the engine that `accelerate launch` or torchrun chose.

    Beside those of `connect`, it has these differences from Accelerate's defaults:

    - FSDP2 also works without a GPU. It keeps inputs, weights and gradient sums in float32.
      `prepare` adds autocast, which the other engines also use. FSDP2's own casts would also round
      timesteps and sizes.
    - DeepSpeed clips at `gradient_clip`, and skips a step whose gradient is not finite
      (`accelerator.optimizer_step_was_skipped`). It does not divide the loss by the number of
      accumulated batches: see `loss_divisor`.

    Args:
        batch_size: samples per forward pass on one process.
        gradient_clip: largest norm of the gradient. Only DeepSpeed needs it in advance.
        **options: arguments of `Accelerator`.

    Raises:
        RuntimeError: if the processes don't find each other.
        ValueError: with FSDP's first version.
    """
    accelerator = connect(**options)
    if _requested("DEEPSPEED"):
        _configure_deepspeed(accelerator, batch_size, gradient_clip)
    elif _requested("FSDP") and accelerator.num_processes > 1:
        _configure_fsdp(accelerator)
    return accelerator


def require_precision(accelerator: Accelerator) -> None:
    """Refuse float16 on a CPU, where Accelerate would compute in float32."""
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError(
            "--mixed-precision fp16, or the one in Accelerate's configuration, needs a GPU, and "
            "this run is on a CPU: give --mixed-precision bf16 or no."
        )


def _has_accelerator() -> bool:
    """Return whether training may use a GPU or another accelerator."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return False
    return torch.accelerator.is_available()


def _requested(engine: str) -> bool:
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
    config["gradient_accumulation_steps"] = 1  # stages may differ; Accelerate decides when to step
    config["gradient_clipping"] = clip
    if config.get("bf16", {}).get("enabled") is True:
        config["bf16"]["check_grad_overflow"] = True


def prepare(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Call `accelerator.prepare`, and add autocast for the engines that lack it."""
    if accelerator.distributed_type in ("FSDP", "DEEPSPEED"):
        add_autocast(accelerator, model)
    return accelerator.prepare(model, optimizer)


def add_autocast(accelerator: Accelerator, model: nn.Module) -> None:
    """Let the forward pass of a model compute in the precision of the run."""
    dtype = DTYPES.get(accelerator.mixed_precision)
    if dtype is not None:
        autocast = torch.autocast(accelerator.device.type, dtype=dtype)
        model.forward = autocast(model.forward)


def loss_divisor(accelerator: Accelerator) -> int:
    """Return the number by which `accelerator.backward` divides a loss: batches per step, or 1."""
    if accelerator.distributed_type == "DEEPSPEED":
        return 1
    return accelerator.gradient_accumulation_steps


class Agreement:
    """Sums, lists and decisions over all processes; every process makes every call."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.alone = accelerator.num_processes == 1

    def total(self, *values: float) -> list[float]:
        """Return the sum of each value over the processes."""
        if self.alone:
            return [float(value) for value in values]
        device = self.accelerator.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        tensor = torch.tensor(values, dtype=dtype, device=device)
        return self.accelerator.reduce(tensor, reduction="sum").tolist()

    def gathered(self, values: list[Any]) -> list[Any]:
        """Return the items of all processes, in the order of the processes."""
        return values if self.alone else gather_object(values)

    def on_main(self, action: Callable[[], Result]) -> Result:
        """Run `action` on the main process, and return its result on all of them.

        Raises:
            TrainingStopped: in every process, if it fails with an error that a user can mend.
        """
        outcome: list[Any] = [None]
        if self.accelerator.is_main_process:
            outcome = [_attempt(action)]
        if not self.alone:
            broadcast_object_list(outcome)
        result, problem = outcome[0]
        if problem is not None:
            raise TrainingStopped(problem)
        return result

    def on_all(self, action: Callable[[], Result]) -> Result:
        """Run `action` on every process. If it fails on one, all stop.

        Raises:
            TrainingStopped: in every process, if one fails with an error that a user can mend.
        """
        result, problem = _attempt(action)
        problems = [text for text in self.gathered([problem]) if text is not None]
        if problems:
            raise TrainingStopped(problems[0])
        return result


def _attempt(action: Callable[[], Result]) -> tuple[Any, str | None]:
    """Return the result and None, or None and a message for the user."""
    try:
        return action(), None
    except (FieldError, OSError, ValueError, ImportError) as error:
        return None, str(error)
