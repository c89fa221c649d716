"""Measuring time: runs that take turns, and what follows from their times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

OUT_OF_MEMORY = "out of memory"
SMALL = 0.02  # bound of random weights


def with_random_weights(
    make: Callable[[], Any], dtype: torch.dtype, device: str | torch.device
) -> Any:
    """A model of small random weights, without the time and memory of its own initialisation."""
    import torch

    with torch.device("meta"):
        model = make()
    # Of a module: Diffusers' models warn of a cast after loading, and nothing was loaded.
    model = torch.nn.Module.to(model, dtype).to_empty(device=device)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            assert tensor.is_floating_point(), "only weights and positions can be made up"
            tensor.uniform_(-SMALL, SMALL)
    return model


def take_turns(
    runs: Sequence[tuple[Callable[[], None], dict[str, Any]]], warm_up: int, repeats: int
) -> None:
    """Run each in turn, again and again, and note the seconds of each in its record.

    The first call is noted apart, and calls before `warm_up` is over do not count. What runs out
    of the device's memory says so in its record and is left out from then on.
    """
    import torch

    for turn in range(warm_up + repeats):
        for run, record in runs:
            if "error" in record:
                continue
            start = time.perf_counter()
            try:
                run()
            except torch.OutOfMemoryError:
                record["error"] = OUT_OF_MEMORY
                record["seconds"] = []
                torch.cuda.empty_cache()
                continue
            seconds = time.perf_counter() - start
            if turn == 0:
                record["first_call"] = seconds
            if turn >= warm_up:
                record["seconds"].append(seconds)


@dataclass(frozen=True)
class Spread:
    """A median with the lowest and the highest."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """That of some values."""
        return cls(statistics.median(values), min(values), max(values))

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)
