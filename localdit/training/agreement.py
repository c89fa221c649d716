"""What the processes of a run tell each other, so that all of them do the same thing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

Result = TypeVar("Result")


class TrainingStopped(Exception):
    """Training can't go on; every process raises it at the same point, with the same message."""


class Agreement:
    """Sums, lists and decisions over all processes; every call is made by all of them."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.alone = accelerator.num_processes == 1

    def total(self, *values: float) -> list[float]:
        """The sum of each value over the processes."""
        if self.alone:
            return [float(value) for value in values]
        device = self.accelerator.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        tensor = torch.tensor(values, dtype=dtype, device=device)
        return self.accelerator.reduce(tensor, reduction="sum").tolist()

    def gathered(self, values: list[Any]) -> list[Any]:
        """The items of all processes, in their order."""
        return values if self.alone else gather_object(values)

    def on_main(self, action: Callable[[], Result]) -> Result:
        """Have the main process do something, and all of them know the result.

        Raises:
            TrainingStopped: in every process, if it fails with an OSError or a ValueError.
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
        """Have every process do something, and all of them know if one fails.

        Raises:
            TrainingStopped: in every process, if one fails with an OSError or a ValueError.
        """
        result, problem = _attempt(action)
        problems = [text for text in self.gathered([problem]) if text is not None]
        if problems:
            raise TrainingStopped(problems[0])
        return result


def _attempt(action: Callable[[], Result]) -> tuple[Any, str | None]:
    """The result and None, or None and what the user is to be told."""
    try:
        return action(), None
    except (OSError, ValueError, ModuleNotFoundError) as error:
        return None, str(error)
