"""Compare the scored runs: intervals over seeds, tables and a plot.

    python recipes/study/report.py --output output/study
    python recipes/study/report.py --output output/study --page docs/study.md

Reads `costs.json` and `scores`, and writes `results.json`, `results.md` and `results.png`. Seeds
without all variants of the first seed are left out. With `--page`, the tables replace what the page
has between its two comments. An interval has 95 % confidence: mean over seeds plus or minus
Student's t times the standard error. Differences to full attention are taken seed by seed, on the
same captions.
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
DRAWINGS = "true-drawings-0"  # as score.py names it
WHEN = {"steps": "Equal steps", "time": "Equal processor time"}
DISTANCES = {"Fréchet distance": "Fréchet", "kernel distance": "kernel"}
DIGITS = {"Fréchet": 2, "kernel": 3, "loss": 4}  # after the point; of shares one
COMPARED = ("all tasks", "loss")  # in the last columns
PLACE = re.compile(r"(<!-- results -->\n).*(<!-- end of results -->)", re.DOTALL)

Measures = dict[str, float]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the study")
    parser.add_argument("--page", type=Path, help="page to write the tables into")
    return parser.parse_args()


def measures(score: Mapping[str, Any]) -> Measures:
    """Return the figures of a score: percentages by task, their mean, distances, loss."""
    shares = {task: 100 * statistics.fmean(right) for task, right in score["right"].items()}
    distances = {short: score["distances"][name] for name, short in DISTANCES.items()}
    figures = {"all tasks": statistics.fmean(shares.values()), **shares, **distances}
    return figures | ({} if score["loss"] is None else {"loss": score["loss"]})


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and half the width of its 95 % interval; None for a single value."""
    if len(values) == 1:
        return values[0], None
    error = statistics.stdev(values) / len(values) ** 0.5
    return statistics.fmean(values), STUDENT_T[len(values) - 2] * error


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
        rows = {name: [measures(scores[f"{name}-{seed}"][when]) for seed in seeds]
                for name in names}  # fmt: skip
        results[when] = {
            name: {
                "seeds": own,
                "mean": over_seeds(own),
                "minus full": over_seeds(differences(own, rows[REFERENCE])),
            }
            for name, own in rows.items()
        }
        drawings = measures(scores[DRAWINGS][when])
        results[when]["true drawings"] = {"mean": over_seeds([drawings])}
    return results


def differences(these: Sequence[Measures], those: Sequence[Measures]) -> list[Measures]:
    """Return the differences of each seed's figures."""
    pairs = zip(these, those, strict=True)
    return [{key: one[key] - other[key] for key in one} for one, other in pairs]


def over_seeds(rows: Sequence[Measures]) -> dict[str, tuple[float, float | None]]:
    """Return the interval of each figure."""
    return {key: interval([row[key] for row in rows]) for key in rows[0]}


def shown(value: Sequence[float | None] | None, key: str, sign: str = "") -> str:
    """Return "mean ± half a width", or the mean alone, of a figure; "" if there is none."""
    if value is None:
        return ""
    mean, half = value
    digits = DIGITS.get(key, 1)
    return f"{mean:{sign}.{digits}f}" + (f" ± {half:.{digits}f}" if half is not None else "")


def tables(results: Mapping[str, Any]) -> str:
    """Return the tables in Markdown: one for equal steps, one for equal processor time."""
    lines = []
    for when, title in WHEN.items():
        keys = list(results[when][REFERENCE]["mean"])
        heads = ["model", "ms a step", "steps", *keys, *(f"{key}, minus full" for key in COMPARED)]
        lines += [f"{title}:", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for name, row in results[when].items():
            cells = [name, "", "", *(shown(row["mean"].get(key), key) for key in keys)]
            if name in results["milliseconds"]:
                cells[1] = f"{results['milliseconds'][name]:.0f}"
                cells[2] = f"{results['scored'][name][when]:,}"
            difference = row.get("minus full", {}) if name != REFERENCE else {}
            cells += [shown(difference.get(key), key, "+") for key in COMPARED]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Plot the share of all tasks by variant, with its interval."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [name for name in results["milliseconds"] if name in results["steps"]]
    figure = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for offset, (when, title) in zip((-0.15, 0.15), WHEN.items(), strict=True):
        means = [results[when][name]["mean"]["all tasks"] for name in names]
        places = [place + offset for place in range(len(names))]
        axes.errorbar(
            places, [mean for mean, _ in means], [half or 0 for _, half in means],
            fmt="o", capsize=3, label=title,
        )  # fmt: skip
        for place, name in zip(places, names, strict=True):
            seeds = [row["all tasks"] for row in results[when][name]["seeds"]]
            axes.plot([place] * len(seeds), seeds, ".", color="grey", markersize=4)
    axes.set_xticks(range(len(names)), names, rotation=20)
    axes.set_ylabel("pictures that are right, %")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3, axis="y")
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    args = parse_args()
    results = read(args.output)
    text = tables(results)
    (args.output / "results.json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    (args.output / "results.md").write_text(text, "utf-8")
    plot(results, args.output / "results.png")
    if args.page:
        page = args.page.read_text("utf-8")
        args.page.write_text(PLACE.sub(lambda m: f"{m[1]}{text}{m[2]}", page), "utf-8")
    print(text)


if __name__ == "__main__":
    main()
