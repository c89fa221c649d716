"""Train the box's transformer a little with each option that promises faster learning, and compare.

    python recipes/speedrun/ablation.py --data output/speedrun/encoded --output output/speedrun

Each variant changes one thing in the first one. All variants of a seed run before the next seed,
and see the same samples, noise and captions. A run leaves `NAME-SEED.json`: the loss of the
averaged weights on samples that are held out, the pictures that are right in everything, and the
processor time of the whole program. Runs that have one are not repeated, so an interrupted
comparison goes on. `ablation.json` and `ablation.md` compare the seeds that all variants have.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BASE = "AdamW"
VARIANTS: dict[str, list[str]] = {
    BASE: [],
    "Muon": ["--optimizer", "muon"],
    "contrast 0.05": ["--contrastive-weight", "0.05"],
    "self-alignment 0.5": ["--alignment-weight", "0.5"],
    "token routing 0.5": ["--token-routing", "0.5"],
    "min-SNR 5": ["--min-snr-gamma", "5"],
    "logit-normal timesteps": ["--timestep-sampling", "logit_normal"],
}
HELD_OUT = 256  # samples
# Two-sided 95 % quantiles of Student's t, from one degree of freedom.
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365)
COLUMNS = {
    "loss": "held-out loss",
    "one object": "one object, % right",
    "two objects": "two objects, % right",
    "seconds": "processor time, s",
}
DIGITS = {"loss": 4, "one object": 1, "two objects": 1, "seconds": 0}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="encoded scenes")
    add("--output", type=Path, required=True, help="folder to write")
    add("--variants", nargs="+", choices=[*VARIANTS], default=[*VARIANTS], help="what to compare")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of weights, order and noise")
    add("--steps", type=int, default=600, help="optimizer steps of a run")
    add("--batch-size", type=int, default=32, help="samples per step")
    add("--learning-rate", type=float, default=2e-3, help="peak learning rate")
    add("--count", type=int, default=200, help="number of held-out captions to draw")
    return parser.parse_args()


def training_command(folder: Path, options: Sequence[str], seed: int, args: Any) -> list[str]:
    """Return the command of a run."""
    return [
        sys.executable, "train.py", "--data-root", str(args.data), "--output", str(folder),
        "--image-size", "128", "--transformer-config", "tiny", "--mixed-precision", "bf16",
        "--num-workers", "0", "--prediction-type", "v_prediction", "--token-dropout", "0.1",
        "--batch-size", str(args.batch_size), "--max-train-steps", str(args.steps),
        "--learning-rate", str(args.learning_rate), "--lr-schedule", "cosine",
        "--warmup-steps", str(args.steps // 20), "--gradient-clip", "1.0", "--ema-decay", "0.99",
        "--validation-samples", str(HELD_OUT), "--validation-interval", str(args.steps),
        "--save-interval", str(args.steps), "--seed", str(seed), *options,
    ]  # fmt: skip


def run(name: str, seed: int, args: argparse.Namespace) -> dict[str, float]:
    """Train and score one variant with one seed, unless that was done."""
    stem = f"{name.replace(' ', '-')}-{seed}"
    result = args.output / f"{stem}.json"
    if result.is_file():
        return json.loads(result.read_text("utf-8"))
    folder, score = args.output / "runs" / stem, args.output / "scores" / stem
    shutil.rmtree(folder, ignore_errors=True)  # of an interrupted run, whose time is unknown
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = training_command(folder.absolute(), VARIANTS[name], seed, args)
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [
            sys.executable, ROOT / "recipes/box/score.py", "--pipeline", folder / "final",
            "--output", score, "--count", str(args.count), "--guidance-scale", "2",
            "--num-inference-steps", "20", "--open-captions", "0",
        ],
        env=environment, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    losses = [json.loads(line).get("validation/ema/loss") for line in lines]
    means = json.loads((score / "score.json").read_text("utf-8"))["mean"]
    found = {
        "loss": [loss for loss in losses if loss is not None][-1],
        **{title.split(" (")[0]: 100 * group["all"] for title, group in means.items()},
        "seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    }
    unfinished = result.with_suffix(".tmp")
    unfinished.write_text(json.dumps(found) + "\n", "utf-8")
    unfinished.replace(result)
    print(stem, json.dumps(found), flush=True)
    return found


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and half the width of its 95 % interval; None for a single value."""
    if len(values) == 1:
        return values[0], None
    error = statistics.stdev(values) / len(values) ** 0.5
    return statistics.fmean(values), STUDENT_T[len(values) - 2] * error


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Return a Markdown table: means over seeds, and the loss minus that of the first variant.

    Args:
        results: the figures of each seed, by variant.
    """

    def shown(values: Sequence[float], digits: int, sign: str = "") -> str:
        mean, half = interval(values)
        return f"{mean:{sign}.{digits}f}" + (f" ± {half:.{digits}f}" if half is not None else "")

    base = results[BASE]
    heads = ["variant", *COLUMNS.values(), "loss minus that of AdamW"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, seeds in results.items():
        cells = [shown([seed[key] for seed in seeds], DIGITS[key]) for key in COLUMNS]
        # Seed by seed: the same samples and noise.
        less = [own["loss"] - other["loss"] for own, other in zip(seeds, base, strict=True)]
        cells.append("" if name == BASE else shown(less, DIGITS["loss"], "+"))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    args = parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in [BASE, *args.variants]}
    for seed in args.seeds:
        for name, found in [(name, run(name, seed, args)) for name in results]:
            results[name].append(found)
        (args.output / "ablation.json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
        (args.output / "ablation.md").write_text(table(results), "utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
