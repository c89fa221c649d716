"""Turn the measurements of a case into costs at a depth, ratios and exponents."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .cases import DENOISERS, PIXELS_PER_TOKEN, Case, Denoiser
from .timing import Spread, at_depth, exponent, paired_ratios, times_at_depth

# The fields that distinguish one curve over sizes from another.
GROUP = ("against", "dtype", "task", "mode", "depth")


def summary(case: Case, results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the costs of each denoiser in a case, and the rival's time relative to LocalDiT's.

    Args:
        results: the result of `timing.measure_times`, with "memory" added to each run.

    Returns:
        "models": the `cost` of each denoiser by name. "ratios": for each LocalDiT with known times,
        the spread of the rival's seconds divided by LocalDiT's seconds in the same turn.
    """
    rival = case.rival.name
    ratios = {}
    times = {}
    for denoiser in case.denoisers:
        runs = results[denoiser.name]["runs"]
        times[denoiser.name] = times_at_depth(runs, case.target_layers(denoiser))
    for name, seconds in times.items():
        if name != rival and seconds and times[rival]:
            ratios[name] = paired_ratios(times[rival], seconds).as_dict()
    models = {
        denoiser.name: cost(case, denoiser, results[denoiser.name]["runs"])
        for denoiser in case.denoisers
    }
    return {"models": models, "ratios": ratios}


def cost(case: Case, denoiser: Denoiser, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the cost of a denoiser at the target depth.

    Returns:
        "layers"; "obtained", either measured or derived; "seconds", a spread; "compile_seconds",
        the first call of the deepest model minus its median call; "memory"; "error". Unknown
        values are None.
    """
    layers = case.target_layers(denoiser)
    seconds = times_at_depth(runs, layers)
    depths = " and ".join(str(run["layers"]) for run in runs)
    return {
        "layers": layers,
        "obtained": f"derived from {depths} layers" if case.derived else "measured",
        "seconds": Spread.of(seconds).as_dict() if seconds else None,
        "compile_seconds": _compile_seconds(runs[-1]) if case.mode == "compiled" else None,
        "memory": _memory(case, runs, layers),
        "error": next((run["error"] for run in runs if "error" in run), None),
    }


def _compile_seconds(run: Mapping[str, Any]) -> float | None:
    return run["first_call"] - statistics.median(run["seconds"]) if run["seconds"] else None


def _memory(
    case: Case, runs: Sequence[Mapping[str, Any]], layers: int
) -> dict[str, int | str] | None:
    """Return the bytes of the weights, the peak bytes beside them, and the total."""
    found = {run["layers"]: run.get("memory") or {} for run in runs}
    for memory in found.values():
        if "beside" not in memory:
            return {"error": memory["error"]} if "error" in memory else None
    weights = at_depth({depth: memory["weights"] for depth, memory in found.items()}, layers)
    beside = {depth: memory["beside"] for depth, memory in found.items()}
    # In inference, a layer's memory is free again when it ends.
    peak = at_depth(beside, layers) if case.task == "training" else max(beside.values())
    return {"total": round(weights + peak), "weights": round(weights), "beside": round(peak)}


def groups(records: Iterable[Mapping[str, Any]]) -> dict[tuple[str, ...], list[Mapping[str, Any]]]:
    """Group the records whose cases differ only in size, by the other fields (`GROUP`)."""
    found: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for record in records:
        if "models" in record.get("summary", {}):
            found.setdefault(tuple(record["case"][name] for name in GROUP), []).append(record)
    return found


def curve(
    records: Iterable[Mapping[str, Any]], name: str, what: str, part: str
) -> list[tuple[int, float]]:
    """Return (tokens of 16 x 16 pixels, cost) of a denoiser for each size whose cost is known.

    Args:
        what, part: keys of `cost`: "seconds" and "median", or "memory" and "beside".
    """
    points = []
    for record in records:
        value = (record["summary"]["models"].get(name, {}).get(what) or {}).get(part)
        if value:
            points.append((record["tokens"], value))
    return sorted(points)


def names_of(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the names of the denoisers in some cases, in order."""
    return list(dict.fromkeys(name for record in records for name in record["summary"]["models"]))


def exponents(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the growth of time, and of memory beside the weights, with the number of tokens.

    Returns:
        For each group and denoiser with at least two known sizes: the fields of the group, the
        "model", its "tokens", and the exponents "seconds" and "beside" (None if unknown).
    """
    rows = []
    for group, members in groups(records).items():
        for name in names_of(members):
            time = curve(members, name, "seconds", "median")
            beside = curve(members, name, "memory", "beside")
            row: dict[str, Any] = dict(zip(GROUP, group, strict=True), model=name)
            wider = (DENOISERS[name].latents.pixels_per_token // PIXELS_PER_TOKEN) ** 2
            row["tokens"] = [tokens // wider for tokens, _ in time]
            row["seconds"], row["beside"] = _slope(time), _slope(beside)
            if row["seconds"] is not None:
                rows.append(row)
    return rows


def _slope(points: Sequence[tuple[int, float]]) -> float | None:
    return exponent([tokens for tokens, _ in points], [cost for _, cost in points])
