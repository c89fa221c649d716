"""Times: taken in turns, and what follows from them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from localdit.machine import OUT_OF_MEMORY, Spread, take_turns

from .cases import Case, Denoiser, make_model, make_run


def measure_times(case: Case) -> dict[str, Any]:
    """Seconds of the runs of each denoiser of a case, in turns, in this process.

    Returns:
        For each denoiser, by its name: "attention" (kernels) and "attention_choice" (in words);
        and for each depth that was run, under "runs": "layers", "weight_bytes", "first_call"
        (seconds) and "seconds" (of those that count), or "error".
    """
    from .backends import attention_of

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
    """A run of a new model; None where there is no memory for it."""
    import torch

    try:
        return make_run(make_model(denoiser, layers, case), case, attention)
    except torch.OutOfMemoryError:
        record["error"] = OUT_OF_MEMORY
        return None


def at_depth(costs: Mapping[int, float], layers: int) -> float:
    """The cost of a model of `layers` blocks, from those of models of other depths.

    From one depth, which has to be the one asked for, it is that cost. From two it is
    `cost(a) + (layers - a) * (cost(b) - cost(a)) / (b - a)`: blocks cost the same each.
    """
    if len(costs) == 1:
        assert layers in costs
        return costs[layers]
    (fewer, cost), (more, higher_cost) = sorted(costs.items())
    return cost + (layers - fewer) * (higher_cost - cost) / (more - fewer)


def times_at_depth(runs: Sequence[Mapping[str, Any]], layers: int) -> list[float]:
    """Seconds at a depth, turn by turn, from the records of `measure_times`."""
    depths = [run["layers"] for run in runs]
    turns = zip(*(run["seconds"] for run in runs), strict=True)
    return [at_depth(dict(zip(depths, seconds, strict=True)), layers) for seconds in turns]


def paired_ratios(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """How many times one is the other, turn by turn."""
    return Spread.of([a / b for a, b in zip(numerators, denominators, strict=True)])


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float | None:
    """The slope of `log cost` against `log size` by least squares; None for less than two sizes.

    1 is linear growth, 2 quadratic.
    """
    if len(set(sizes)) < 2:
        return None
    return statistics.linear_regression(
        [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    ).slope
