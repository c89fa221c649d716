"""The picture of a run: its losses and learning rate by step."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMOOTHING = 0.04  # share of the lines that a point of the smoothed curve is the mean of
VALIDATION = "validation/{name}/loss"


def draw_curves(metrics_jsonl: Path, png: Path) -> None:
    """Draw what a run has logged so far; the file is written whole or not at all.

    Above the training loss of each line, the same smoothed, and the validation losses of model and
    average; below the learning rate. A last line that is not complete is left out.

    Args:
        metrics_jsonl: a JSON object a line, with `step` and any of `loss`, `learning_rate`,
            `validation/model/loss` and `validation/ema/loss`.
        png: the picture.

    Raises:
        ModuleNotFoundError: without matplotlib.
        OSError: if one can't be read, or the other not written.
        ValueError: if no line has a loss.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Curves are drawn with matplotlib: pip install -r requirements-train.txt"
        ) from error

    lines = read_metrics(metrics_jsonl)
    if not _series(lines, "loss")[0]:
        raise ValueError(f"{metrics_jsonl} has no line with a step and a loss yet.")
    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)  # no display, and no state shared with other figures
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    _draw_losses(above, lines)
    above.set(title=f"{metrics_jsonl.parent.name}: {lines[-1]['step']:,} steps", ylabel="loss")
    below.plot(*_series(lines, "learning_rate"), color="tab:gray")
    below.set(xlabel="step", ylabel="learning rate")
    below.set_ylim(bottom=0)
    below.xaxis.set_major_formatter("{x:,.0f}")
    below.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axes in (above, below):
        axes.grid(alpha=0.3)

    unfinished = png.with_name(f".{png.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(unfinished, format="png", dpi=100)
        os.replace(unfinished, png)
    finally:
        unfinished.unlink(missing_ok=True)


def read_metrics(metrics_jsonl: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; an unfinished last one is left out.

    A run that went on from an earlier checkpoint repeats steps: a line takes the place of all that
    are above it with later steps.

    Raises:
        ValueError: for another line that is no JSON object.
    """
    texts = metrics_jsonl.read_text(encoding="utf-8").splitlines()
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            if number == len(texts):
                break
            raise ValueError(f"{metrics_jsonl}, line {number}, is no JSON: {error}.") from None
        while lines and lines[-1].get("step", 0) > line.get("step", 0):
            lines.pop()
        lines.append(line)
    return lines


def smoothed(values: Sequence[float]) -> list[float]:
    """Means over `SMOOTHING` of the values around each, as many before it as after it.

    Close to the start there are fewer, so that a steep fall stays where it is. At the end those
    after it run out. Values that are not finite are left out.
    """
    reach = int(len(values) * SMOOTHING / 2)
    means = []
    for i in range(len(values)):
        near = min(reach, i)
        window = [value for value in values[i - near : i + near + 1] if math.isfinite(value)]
        means.append(sum(window) / len(window) if window else math.nan)
    return means


def _series(lines: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of the lines that have the value."""
    found = [(line["step"], line[name]) for line in lines if name in line and "step" in line]
    return [step for step, _ in found], [value for _, value in found]


def _draw_losses(axes: Axes, lines: Sequence[dict[str, Any]]) -> None:
    steps, losses = _series(lines, "loss")
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=1, label="training")
    axes.plot(steps, smoothed(losses), color="tab:blue", label="training, smoothed")
    validation: list[float] = []
    for name, label, colour in (("model", "model", "tab:orange"), ("ema", "average", "tab:green")):
        steps, losses_then = _series(lines, VALIDATION.format(name=name))
        if steps:
            axes.plot(
                steps, losses_then, "o-", color=colour, markersize=4, label=f"validation, {label}"
            )
            validation += losses_then
    axes.legend()
    _limit(axes, losses, validation)


def _limit(axes: Axes, training: Sequence[float], validation: Sequence[float]) -> None:
    """Let a few outliers of training, such as its start, not press all the rest flat."""
    finite = sorted(filter(math.isfinite, training))
    if len(finite) < 20:
        return
    kept = [*finite[: math.ceil(0.98 * len(finite))], *filter(math.isfinite, validation)]
    low, high = min(kept), max(kept)
    room = 0.15 * (high - low)
    if low < high and high + 2 * room < finite[-1]:
        axes.set_ylim(low - room, high + 2 * room)
