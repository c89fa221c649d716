"""Plot costs against tokens."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cases import LOCALDIT, PIXART, SANA
from .results import GROUP, curve, groups, names_of
from .timing import exponent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLES = {
    LOCALDIT["local"].name: ("tab:blue", "o"),
    LOCALDIT["global"].name: ("tab:green", "s"),
    LOCALDIT["f32"].name: ("tab:cyan", "D"),
    LOCALDIT["pooled"].name: ("tab:purple", "P"),
    PIXART.name: ("tab:red", "^"),
    SANA.name: ("tab:orange", "v"),
}


def draw(records: Sequence[Mapping[str, Any]], png: Path) -> bool:
    """Plot time and peak memory of each model against tokens, one row per group of cases.

    Returns:
        True if there was anything to plot. The file is written atomically.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "The plot is left out: it needs matplotlib (pip install -r requirements-train.txt)"
        ) from error

    found = groups(records)
    if not found:
        return False
    figure = Figure(figsize=(11, 4.2 * len(found)), layout="constrained")
    FigureCanvasAgg(figure)  # needs no display and shares no state with other figures
    panels = figure.subplots(len(found), 2, squeeze=False)
    for (group, members), (left, right) in zip(found.items(), panels, strict=True):
        title = _title(dict(zip(GROUP, group, strict=True)), members)
        _draw_costs(left, members, "seconds", "median", 1)
        left.set(title=title, ylabel=f"{members[0]['case']['task']}, seconds")
        _draw_costs(right, members, "memory", "total", 2**30)
        right.set(title=title, ylabel="peak memory, GiB")
    unfinished = png.with_name(f".{png.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(unfinished, format="png", dpi=110)
        os.replace(unfinished, png)
    finally:
        unfinished.unlink(missing_ok=True)
    return True


def _title(group: Mapping[str, str], members: Sequence[Mapping[str, Any]]) -> str:
    """Return the title of a row of panels."""
    costs = members[0]["summary"]["models"]
    own, *_, others = [cost["layers"] for cost in costs.values()]  # the rival comes last
    if group["depth"] == "equal":
        depth = f"{others} layer{'s' * (others > 1)} each"
    else:
        derived = any(cost["obtained"] != "measured" for cost in costs.values())
        depth = f"{own} against {others} layers{' (derived)' if derived else ''}"
    return f"{group['task']}, {group['dtype']}, {group['mode']}: {depth}"


def _draw_costs(
    axes: Axes, members: Sequence[Mapping[str, Any]], what: str, part: str, unit: float
) -> None:
    """Plot the curve of each model, and for times a bar from lowest to highest."""
    from matplotlib.ticker import LogLocator

    sizes = set()
    for name in names_of(members):
        colour, marker = STYLES[name]
        points = curve(members, name, what, part)
        if not points:
            continue
        tokens = [size for size, _ in points]
        costs = [cost / unit for _, cost in points]
        slope = exponent(tokens, costs) if what == "seconds" else None
        label = name if slope is None else f"{name}: tokens$^{{{slope:.2f}}}$"
        axes.plot(tokens, costs, color=colour, marker=marker, label=label)
        if what == "seconds":
            lowest = [cost for _, cost in curve(members, name, what, "lowest")]
            highest = [cost for _, cost in curve(members, name, what, "highest")]
            axes.vlines(tokens, lowest, highest, color=colour, linewidth=4, alpha=0.35)
        sizes |= set(tokens)
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = sorted(sizes)
    axes.set_xticks(ticks, [f"{size:,}\n{round(size**0.5) * 16} px" for size in ticks])
    axes.minorticks_off()
    axes.margins(y=0.15)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.set_xlabel("tokens of 16 x 16 pixels (side of the image in pixels)")
    axes.grid(alpha=0.3, which="both")
    if sizes:
        axes.legend()
