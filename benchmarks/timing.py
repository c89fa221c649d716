"""Measure times in turns, and derive costs at other depths, ratios and exponents."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from localdit.machine import OUT_OF_MEMORY, take_turns

from .attention_kernels import attention_of
from .cases import Case, Denoiser
from .runs import make_model, make_run


def measure_times(case: Case) -> dict[str, Any]:
    """Time the denoisers of a case in turns, in this process.

    Returns:
        For each denoiser, by name: "attention" (kernels) and "attention_choice" (in words);
        and "runs", with for each depth "layers", "first_call" (seconds) and "seconds" (of the
        counted runs), or "error".
    """
    results: dict[str, Any] = {}
    runs: list[tuple[Callable[[], None], dict[str, Any]]] = []
    for denoiser in case.denoisers:
        attention, choice = attention_of(denoiser, case)
        result: dict[str, Any] = {"attention": attention, "attention_choice": choice, "runs": []}
        results[denoiser.name] = result
        for layers in case.measured_layers(denoiser):
            record: dict[str, Any] = {"layers": layers, "seconds": []}
            result["runs"].append(record)
            run = _made(denoiser, layers, case, attention, record)
            if run is not None:
                runs.append((run, record))
    take_turns(runs, case.warm_up, case.repeats)
    return results


def _made(
    denoiser: Denoiser, layers: int, case: Case, attention: list[str], record: dict[str, Any]
) -> Callable[[], None] | None:
    """Return a run of a new model; None if there is not enough memory."""
    import torch

    try:
        return make_run(make_model(denoiser, layers, case), denoiser, case, attention)
    except torch.OutOfMemoryError:
        record["error"] = OUT_OF_MEMORY
        return None


def at_depth(costs: Mapping[int, float], layers: int) -> float:
    """Return the cost of a model with `layers` blocks, from the costs at one or two depths.

    A single depth must be `layers` itself. From two depths a and b it is
    `cost(a) + (layers - a) * (cost(b) - cost(a)) / (b - a)`, since all blocks cost the same.
    """
    if len(costs) == 1:
        assert layers in costs
        return costs[layers]
    (fewer, cost), (more, higher_cost) = sorted(costs.items())
    return cost + (layers - fewer) * (higher_cost - cost) / (more - fewer)


def times_at_depth(runs: Sequence[Mapping[str, Any]], layers: int) -> list[float]:
    """Return the seconds at a depth, turn by turn, from the records of `measure_times`."""
    depths = [run["layers"] for run in runs]
    turns = zip(*(run["seconds"] for run in runs), strict=True)
    return [at_depth(dict(zip(depths, seconds, strict=True)), layers) for seconds in turns]


@dataclass(frozen=True)
class Spread:
    """The median, the lowest and the highest of some values."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of `values`."""
        return cls(statistics.median(values), min(values), max(values))

    def as_dict(self) -> dict[str, float]:
        """Return the three as a dict, for JSON."""
        return asdict(self)


def paired_ratios(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Return the spread of the ratios, turn by turn."""
    return Spread.of([a / b for a, b in zip(numerators, denominators, strict=True)])


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float | None:
    """Return the least-squares slope of log cost over log size; None for fewer than two sizes.

    1 is linear growth, 2 quadratic.
    """
    if len(set(sizes)) < 2:
        return None
    return statistics.linear_regression(
        [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    ).slope
