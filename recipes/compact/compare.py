"""Score the checkpoints of two runs over their steps: from nothing, and transferred.

    python recipes/compact/compare.py --nothing output/compact/nothing \
        --transferred output/compact/transferred --output output/compact/comparison

Each checkpoint draws the same held-out captions from the same noise with `recipes/box/score.py`.
Writes `comparison.json` and `comparison.md`: the share of pictures in which everything is right,
and the first step at which the transferred model is as good as the other one is at its best. What
was scored before with the same settings is not scored again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SCORE = Path(__file__).parents[1] / "box/score.py"
RUNS = ("nothing", "transferred")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in RUNS:
        parser.add_argument(f"--{name}", type=Path, required=True, help="folder of the run")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--side", type=int, default=256, help="width and height in pixels")
    parser.add_argument("--count", type=int, default=200, help="number of held-out captions")
    parser.add_argument("--num-inference-steps", type=int, default=20,
                        help="number of inference steps")  # fmt: skip
    parser.add_argument("--guidance-scale", type=float, default=2.0, help="weight of the caption")
    return parser.parse_args()


def checkpoints(run: Path) -> dict[int, Path]:
    """Return the checkpoints of a run by step, in order."""
    found = {int(path.name.partition("-")[2]): path for path in run.glob("checkpoint-*")}
    return dict(sorted(found.items()))


def is_scored(report: Path, settings: dict[str, Any]) -> bool:
    """Return whether a report of `recipes/box/score.py` is of these settings."""
    if not report.is_file():
        return False
    known = json.loads(report.read_text("utf-8")).get("settings", {})
    return known | settings == known


def score(checkpoint: Path, folder: Path, args: argparse.Namespace) -> float:
    """Return the share of captions whose pictures are right in everything."""
    report = folder / "score.json"
    settings = {
        "pipeline": str(checkpoint),
        "side": args.side,
        "count": args.count,
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale,
        "open_captions": 0,
    }
    if not is_scored(report, settings):
        options = [(f"--{name.replace('_', '-')}", str(value)) for name, value in settings.items()]
        subprocess.run(
            [sys.executable, SCORE, "--output", folder, *itertools.chain(*options)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
    pictures = json.loads(report.read_text("utf-8"))["pictures"]
    return sum(picture["score"]["all"] for picture in pictures) / len(pictures)


def first_as_good(curve: dict[int, float], goal: float) -> int | None:
    """Return the first step whose share reaches the goal; None if none does."""
    return next((step for step, share in curve.items() if share >= goal), None)


def table(curves: dict[str, dict[int, float]]) -> str:
    """Return a Markdown table with a row per step, and a sentence on the steps that were saved."""
    lines = ["| step | from nothing | transferred |", "|---|---|---|"]
    for step in sorted(set().union(*curves.values())):
        shares = (curves[name].get(step) for name in RUNS)
        cells = ("–" if share is None else f"{100 * share:.1f} %" for share in shares)
        lines.append(f"| {step:,} | {' | '.join(cells)} |")
    best = max(curves["nothing"].values())
    reached = {name: first_as_good(curves[name], best) for name in RUNS}
    verdict = f"From nothing: {100 * best:.1f} % at best, at step {reached['nothing']:,}. "
    if reached["transferred"] is None:
        verdict += "The transferred model does not reach that."
    else:
        share = reached["transferred"] / reached["nothing"]
        verdict += (
            f"Transferred: step {reached['transferred']:,}, {100 * share:.0f} % of the steps."
        )
    return "\n".join([*lines, "", verdict, ""])


def main() -> None:
    args = parse_args()
    curves: dict[str, dict[int, float]] = {}
    for name in RUNS:
        curves[name] = {}
        for step, checkpoint in checkpoints(getattr(args, name)).items():
            curves[name][step] = score(checkpoint, args.output / f"{name}-{step}", args)
            print(f"{name}, step {step:,}: {100 * curves[name][step]:.1f} %", flush=True)
        if not curves[name]:
            raise SystemExit(f"--{name} {getattr(args, name)} has no checkpoints.")
    page = table(curves)
    (args.output / "comparison.json").write_text(json.dumps(curves, indent=1) + "\n", "utf-8")
    (args.output / "comparison.md").write_text(page, "utf-8")
    print(page)


if __name__ == "__main__":
    main()
