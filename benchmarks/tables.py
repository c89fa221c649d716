"""Write results as Markdown and JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .cases import HEAD_DIM, HEADS, RIVALS
from .provenance import sentence
from .results import exponents

COLUMNS = (
    "pixels", "precision", "task", "mode", "depth", "model", "layers",
    "seconds (lowest to highest)", "other : LocalDiT", "compiling, s", "weights, GiB", "peak, GiB",
)  # fmt: skip
EXPONENT_COLUMNS = (
    "precision", "task", "mode", "depth", "model", "tokens", "exponent of time",
    "of memory beside weights",
)  # fmt: skip
UNKNOWN = "–"
_RIVALS = {denoiser.name for denoiser in RIVALS.values()}


def line(cells: Iterable[str]) -> str:
    """Return a row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def head(columns: Sequence[str]) -> str:
    """Return the first two rows of a Markdown table."""
    return f"{line(columns)}\n|{'---|' * len(columns)}"


def rows(record: Mapping[str, Any]) -> list[str]:
    """Return a case as rows of a table, one per denoiser."""
    case = record["case"]
    first = [f"{case['pixels']} x {case['pixels']}"]
    first += [case[name] for name in ("dtype", "task", "mode", "depth")]
    if "error" in record:
        return [line([*first, record["error"], *[UNKNOWN] * (len(COLUMNS) - len(first) - 1)])]
    summary = record["summary"]
    return [
        line([*first, name, *_cells(cost, summary["ratios"].get(name), name)])
        for name, cost in summary["models"].items()
    ]


def _cells(cost: Mapping[str, Any], ratio: Mapping[str, float] | None, name: str) -> list[str]:
    """Return the cells of a denoiser, from the column "layers" on."""
    obtained = "" if cost["obtained"] == "measured" else f", {cost['obtained']}"
    unknown = cost["error"] or UNKNOWN
    memory = cost["memory"] or {}
    spread = cost["seconds"]
    return [
        f"{cost['layers']}{obtained}",
        _spread(spread, seconds) if spread else unknown,
        "1" if name in _RIVALS and spread else _spread(ratio, "{:.2f}".format) if ratio
        else UNKNOWN,
        UNKNOWN if cost["compile_seconds"] is None else seconds(cost["compile_seconds"]),
        gibibytes(memory.get("weights")),
        gibibytes(memory.get("total")) if "error" not in memory else memory["error"],
    ]  # fmt: skip


def _spread(spread: Mapping[str, float], shown: Any) -> str:
    low, high = shown(spread["lowest"]), shown(spread["highest"])
    return f"{shown(spread['median'])} ({low} to {high})"


def seconds(value: float) -> str:
    """Format seconds with three digits, without a power of ten."""
    for digits in range(5):
        if value >= 100 / 10**digits:
            return f"{value:.{digits}f}"
    return f"{value:.5f}"


def gibibytes(count: int | None) -> str:
    """Format bytes as GiB."""
    return UNKNOWN if count is None else f"{count / 2**30:.2f}"


def markdown(about: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    """Return the page with all cases, the exponents and the notes."""
    parts = ["\n".join([head(COLUMNS), *(row for record in records for row in rows(record))])]
    growth = exponent_table(records)
    if growth:
        parts.append(growth)
    parts.append(notes(about, records))
    return "\n\n".join(parts) + "\n"


def exponent_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of exponents; empty if there is only one size."""
    found = exponents(records)
    if not found:
        return ""
    lines = [
        line([
            *(row[name] for name in ("dtype", "task", "mode", "depth", "model")),
            ", ".join(f"{tokens:,}" for tokens in row["tokens"]),
            f"{row['seconds']:.2f}",
            UNKNOWN if row["beside"] is None else f"{row['beside']:.2f}",
        ])
        for row in found
    ]  # fmt: skip
    return "\n".join([head(EXPONENT_COLUMNS), *lines])


def what(case: Mapping[str, Any]) -> str:
    """Return a short description of a case."""
    kind = f"{case['dtype']} {case['task']} {case['mode']} {case['depth']}"
    return f"{case['pixels']} {kind}, against {case['against']}"


def notes(about: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    """Return the notes below the table: units, attention kernels, machine and command."""
    options = about["options"]
    lines = [
        f"Blocks {HEADS * HEAD_DIM} channels wide, random weights, batch size "
        f"{options['batch_size']}, {options['text_tokens']} text tokens. The models run in turn. "
        f"Warm-up rounds: {options['warm_up']}; timed rounds: {options['repeats']}. Times are "
        "medians over the rounds; the ratio is the median of the ratios of the rounds. "
        "Compiling: the time of the first call minus the median time. Peak: the weights and all "
        "other memory of a run, in a separate process, without the libraries. An exponent of 1 "
        "means linear growth, 2 quadratic growth."
    ]
    kernels: dict[tuple[str, str], list[str]] = {}
    for record in records:
        for name, result in record.get("results", {}).items():
            kernels.setdefault((name, result["attention_choice"]), []).append(what(record["case"]))
    lines += [
        f"Attention kernel of {name}: {choice} ({'; '.join(cases)})."
        for (name, choice), cases in kernels.items()
    ]
    return "\n\n".join([*lines, sentence(about)])


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically: on failure the old content stays."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def save(stem: Path, about: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> None:
    """Write the results so far."""
    content = {"about": about, "cases": records, "exponents": exponents(records)}
    save_as(stem, content, markdown(about, records))


def save_as(stem: Path, content: Mapping[str, Any], page: str) -> None:
    """Write `stem`.json and `stem`.md."""
    write_whole(stem.with_suffix(".json"), json.dumps(content, indent=1) + "\n")
    write_whole(stem.with_suffix(".md"), page)
