"""AdamW, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, get_args

import torch

OptimizerName = Literal["adamw", "adamw8bit"]
LearningRateSchedule = Literal["constant", "cosine"]


def make_optimizer(
    parameters: Iterable[torch.nn.Parameter],
    name: OptimizerName,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    device: torch.device | str = "cpu",
) -> torch.optim.Optimizer:
    """Return AdamW (Loshchilov & Hutter, 2019) over all parameters.

    Args:
        parameters: the parameters to train.
        name: "adamw", or "adamw8bit", whose two moments take a quarter of the memory (Dettmers et
            al., 2022; parameters of fewer than 4096 values keep theirs in float32).
        learning_rate: the rate of the first step.
        weight_decay: share of a weight, times the learning rate, that each step subtracts.
        betas: decay of the first and the second moment.
        device: the device of the parameters.

    Raises:
        ValueError: for another name.
        ModuleNotFoundError: if bitsandbytes is missing for "adamw8bit".
    """
    if name == "adamw":
        return torch.optim.AdamW(
            parameters,
            lr=learning_rate,
            betas=betas,
            weight_decay=weight_decay,
            fused=torch.device(device).type in ("cpu", "cuda"),
        )
    if name != "adamw8bit":
        raise ValueError(
            f"The optimizer is {name!r}; expected {' or '.join(get_args(OptimizerName))}."
        )
    try:
        from bitsandbytes.optim import AdamW8bit
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "The optimizer adamw8bit needs bitsandbytes: pip install bitsandbytes, or choose adamw."
        ) from error
    return AdamW8bit(parameters, lr=learning_rate, betas=betas, weight_decay=weight_decay)


def learning_rate(
    step: int,
    total_steps: int,
    peak: float,
    warmup_steps: int = 0,
    schedule: LearningRateSchedule = "constant",
) -> float:
    """Return the learning rate of one step.

    `peak * step / warmup_steps` during the warm-up, so its first step has a rate of 0. Then `peak`
    ("constant"), or `peak * (1 + cos(pi * p)) / 2` ("cosine"; Loshchilov & Hutter, 2017, eq. 5)
    where p goes from 0 at the end of the warm-up to 1 at `total_steps`.

    Args:
        step: the coming step, counted from 0.
        total_steps: steps of the run, or of its stage.
        peak: the highest learning rate.
        warmup_steps: steps of the rise from 0.
        schedule: the rate after the warm-up.

    Raises:
        ValueError: for another schedule.
    """
    if schedule not in get_args(LearningRateSchedule):
        raise ValueError(
            f"The learning rate schedule is {schedule!r}; expected "
            f"{' or '.join(get_args(LearningRateSchedule))}."
        )
    if step < warmup_steps:
        return peak * step / warmup_steps
    if schedule == "constant":
        return peak
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return peak * (1 + math.cos(math.pi * progress)) / 2
