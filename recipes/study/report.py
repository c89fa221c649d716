"""Compare the scored runs: intervals over seeds, tables and a plot.

    python recipes/study/report.py --output output/study
    python recipes/study/report.py --output output/study --page docs/study.md

Reads `costs.json` and `scores`, and writes `results.json`, `results.md`, `results.png` and
`samples.png`. Seeds without all variants of the first seed are left out. With `--page`, the tables
replace what the page has between the two comments that name `--place`. An interval has 95 %
confidence: mean over seeds plus or minus Student's t times the standard error. With a single seed,
shares have an interval over its captions instead, and other figures have none. Differences to full
attention are taken seed by seed, on the same captions.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Two-sided 95 % quantiles of Student's t, from one degree of freedom.
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
REFERENCE = "full"
TRUE = "true-pictures-0"  # as score.py names it
WHEN = {"steps": "Equal steps", "time": "Equal processor time"}
DISTANCES = {"Fréchet distance": "Fréchet", "kernel distance": "kernel"}
DIGITS = {"Fréchet": 2, "kernel": 3, "loss": 4}  # after the point; of shares one
COMPARED = (
    "all tasks",
    "Fréchet",
    "loss",
)  # with intervals, compared with full attention

Measures = dict[str, float]
Right = Mapping[str, Sequence[bool]]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the study")
    parser.add_argument("--page", type=Path, help="page to write the tables into")
    parser.add_argument("--place", default="results", help="name of the two comments in the page")
    return parser.parse_args()


def measures(score: Mapping[str, Any]) -> Measures:
    """Return the figures of a score: percentages by task, their mean, distances, loss."""
    shares = {task: 100 * statistics.fmean(right) for task, right in score["right"].items()}
    distances = {short: score["distances"][name] for name, short in DISTANCES.items()}
    figures = {**({"all tasks": statistics.fmean(shares.values())} if shares else {}), **shares}
    figures |= distances
    return figures | ({} if score["loss"] is None else {"loss": score["loss"]})


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean over seeds and half of its 95 % interval, None for a single seed."""
    if len(values) == 1:
        return values[0], None
    error = statistics.stdev(values) / len(values) ** 0.5
    return statistics.fmean(values), STUDENT_T[len(values) - 2] * error


def over_captions(right: Right, other: Right | None = None) -> Measures:
    """Return half the 95 % interval of each share, or of its difference to another, in per cent.

    This is the normal approximation over the captions of one seed, which both have in common.

    Args:
        right, other: for each task, which of its captions are right.
    """
    variances = {}
    for task, own in right.items():
        others = other[task] if other else [False] * len(own)
        values = [int(one) - int(two) for one, two in zip(own, others, strict=True)]
        variances[task] = statistics.variance(values) / len(values)
    variances["all tasks"] = sum(variances.values()) / len(variances) ** 2
    return {name: 196 * variance**0.5 for name, variance in variances.items()}


def read(folder: Path) -> dict[str, Any]:
    """Return the results of the whole seeds, as JSON values.

    Raises:
        SystemExit: if the reference is not scored yet.
    """
    costs = json.loads((folder / "costs.json").read_text("utf-8"))
    scores = {path.stem: json.loads(path.read_text("utf-8"))
              for path in (folder / "scores").glob("*.json")}  # fmt: skip
    found = sorted({int(stem.rpartition("-")[2]) for stem in scores})
    names = [name for name in costs["milliseconds"] if f"{name}-{found[0]}" in scores]
    seeds = [seed for seed in found if all(f"{name}-{seed}" in scores for name in names)]
    if REFERENCE not in names:
        raise SystemExit(f"The variant {REFERENCE} is not scored yet.")
    results: dict[str, Any] = {"seeds": seeds, **costs}
    for when in WHEN:
        own = {name: [scores[f"{name}-{seed}"][when] for seed in seeds] for name in names}
        full = own[REFERENCE]
        results[when] = {
            name: {
                "seeds": [measures(score) for score in rows],
                "mean": over_seeds(rows),
                "minus full": over_seeds(rows, full),
            }
            for name, rows in own.items()
        }
        results[when]["true pictures"] = {"mean": over_seeds([scores[TRUE][when]])}
    return results


def over_seeds(
    scores: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]] | None = None
) -> dict[str, tuple[float, float | None]]:
    """Return each figure's mean and half of its interval; with `others`, of the differences."""
    rows = [measures(score) for score in scores]
    if others:
        pairs = zip(rows, map(measures, others), strict=True)
        rows = [{key: one[key] - two[key] for key in one} for one, two in pairs]
    found = {key: interval([row[key] for row in rows]) for key in rows[0]}
    if len(scores) == 1 and scores[0]["right"]:
        halves = over_captions(scores[0]["right"], others[0]["right"] if others else None)
        found |= {key: (found[key][0], half) for key, half in halves.items()}
    return found


def shown(
    value: Sequence[float | None] | None, key: str, with_interval: bool = True, sign: str = ""
) -> str:
    """Return "mean ± half an interval", or the mean alone, of a figure; "" if there is none."""
    if value is None:
        return ""
    mean, half = value
    digits = DIGITS.get(key, 1)
    error = f" ± {half:.{digits}f}" if with_interval and half is not None else ""
    return f"{mean:{sign}.{digits}f}{error}"


def tables(results: Mapping[str, Any]) -> str:
    """Return the tables in Markdown: one for equal steps, one for equal processor time."""
    lines = []
    for when, title in WHEN.items():
        keys = list(results[when][REFERENCE]["mean"])
        compared = [key for key in COMPARED if key in keys]
        heads = ["model", "ms a step", "steps", *keys, *(f"{key}, minus full" for key in compared)]
        lines += [f"{title}:", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for name, row in results[when].items():
            means = row["mean"]
            cells = [name, "", "", *(shown(means.get(key), key, key in compared) for key in keys)]
            if name in results["milliseconds"]:
                cells[1] = f"{results['milliseconds'][name]:.0f}"
                cells[2] = f"{results['scored'][name][when]:,}"
            difference = row.get("minus full", {}) if name != REFERENCE else {}
            cells += [shown(difference.get(key), key, sign="+") for key in compared]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Plot the share of all tasks by variant, or else the Fréchet distance, with its interval."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [name for name in results["milliseconds"] if name in results["steps"]]
    key = next(key for key in COMPARED if key in results["steps"][REFERENCE]["mean"])
    figure = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for offset, (when, title) in zip((-0.15, 0.15), WHEN.items(), strict=True):
        means = [results[when][name]["mean"][key] for name in names]
        places = [place + offset for place in range(len(names))]
        axes.errorbar(
            places, [mean for mean, _ in means], [half or 0 for _, half in means],
            fmt="o", capsize=3, label=title,
        )  # fmt: skip
        for place, name in zip(places, names, strict=True):
            seeds = [row[key] for row in results[when][name]["seeds"]]
            axes.plot([place] * len(seeds), seeds, ".", color="grey", markersize=4)
    axes.set_xticks(range(len(names)), names, rotation=20)
    axes.set_ylabel({"all tasks": "pictures that are right, %"}.get(key, f"{key} distance"))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3, axis="y")
    axes.legend()
    figure.savefig(path, dpi=110)


def samples(names: Sequence[str], folder: Path, path: Path) -> None:
    """Save the first row of each run's pictures, of one seed, one run above the other."""
    from PIL import Image

    grids = [Image.open(folder / "scores" / f"{name}.png") for name in names]
    height = grids[0].height // 4  # of a row
    sheet = Image.new("RGB", (grids[0].width, height * len(grids)))
    for row, grid in enumerate(grids):
        sheet.paste(grid.crop((0, 0, grid.width, height)), (0, row * height))
    sheet.save(path)


def write_into(page: Path, place: str, text: str) -> None:
    """Replace what a page has between the two comments that name a place."""
    between = re.compile(rf"(<!-- {place} -->\n).*(<!-- end of {place} -->)", re.DOTALL)
    new, count = between.subn(lambda m: f"{m[1]}{text}{m[2]}", page.read_text("utf-8"))
    if count != 1:
        raise SystemExit(f"{page} has no comments <!-- {place} --> and <!-- end of {place} -->.")
    page.write_text(new, "utf-8")


def main() -> None:
    args = parse_args()
    results = read(args.output)
    text = tables(results)
    (args.output / "results.json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    (args.output / "results.md").write_text(text, "utf-8")
    plot(results, args.output / "results.png")
    runs = [f"{name}-{results['seeds'][0]}" for name in results["steps"] if name != "true pictures"]
    samples([TRUE, *runs], args.output, args.output / "samples.png")
    if args.page:
        write_into(args.page, args.place, text)
    print(text)


if __name__ == "__main__":
    main()
