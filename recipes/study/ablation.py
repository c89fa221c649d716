"""Train the study's model of windows with each option that promises faster learning, and compare.

    python recipes/study/ablation.py --output output/study

Each variant changes one thing in the first one. Needs what `build.sh` has written into the folder:
`vae`, `encoded`, `extractor` and `variants`. All variants of a seed run before the next seed, and
see the same drawings, noise and captions. `ablation/NAME-SEED.json` has the figures of a run, with
the processor time of the whole program. Runs that have one are not repeated, so an interrupted
comparison goes on; one with other settings is refused. `ablation.json` and `ablation.md` compare
the seeds that all variants have; with `--page`, the table also replaces what the page has between
its two comments.
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

import scenes
import score
from report import interval, write_into

ROOT = Path(__file__).parents[2]
BASE = "AdamW"
VARIANTS: dict[str, list[str]] = {
    BASE: [],
    "Muon": ["--optimizer", "muon"],
    "contrast 0.05": ["--contrastive-weight", "0.05"],
    "self-alignment 0.5": ["--alignment-weight", "0.5"],
    "token routing 0.5": ["--token-routing", "0.5"],
    "logit-normal timesteps": ["--timestep-sampling", "logit_normal"],
}
DIGITS = {"loss": 4, "right, %": 1, "Fréchet distance": 1, "processor time, s": 0}

Figures = dict[str, float]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder of the study")
    add("--model", default="windows", help="variant of the study to train")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of weights, order and noise")
    add("--steps", type=int, default=1200, help="optimizer steps of a run")
    add("--batch-size", type=int, default=32, help="pictures per step")
    add("--learning-rate", type=float, default=2e-3, help="learning rate after the warm-up")
    add("--count", type=int, default=200, help="number of captions")
    add("--real", type=int, default=500, help="number of true drawings")
    add("--num-inference-steps", type=int, default=20, help="inference steps")
    add("--guidance-scale", type=float, default=2.0, help="weight of the caption")
    add("--page", type=Path, help="page to write the table into")
    return parser.parse_args()


def train(folder: Path, name: str, seed: int, args: argparse.Namespace) -> float:
    """Train a variant, and return the processor time of the program in seconds."""
    command = [
        sys.executable, "train.py", "--data-root", args.output / "encoded", "--output", folder,
        "--image-size", scenes.SIDE, "--crop", "center", "--num-workers", 0,
        "--pretrained", "localdit/box", "--vae", args.output / "vae",
        "--transformer-config", args.output / "variants" / f"{args.model}.json",
        "--mixed-precision", "bf16", "--prediction-type", "flow", "--token-dropout", 0.1,
        "--batch-size", args.batch_size, "--max-train-steps", args.steps,
        "--learning-rate", args.learning_rate, "--warmup-steps", 20, "--gradient-clip", 1.0,
        "--ema-decay", 0.99, "--save-interval", args.steps, "--seed", seed, *VARIANTS[name],
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        list(map(str, command)), cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(name: str, seed: int, args: argparse.Namespace) -> Figures:
    """Train and score one variant with one seed, unless that was done.

    Raises:
        SystemExit: if it was done with other settings.
    """
    stem = f"{name.replace(' ', '-')}-{seed}"
    path = args.output / "ablation" / f"{stem}.json"
    now = score.settings(args, "model", "steps", "batch_size", "learning_rate")
    if path.is_file():
        figures = json.loads(path.read_text("utf-8"))
        before = figures.pop("settings", None)
        if before != now:
            raise SystemExit(
                f"{path} was measured with the settings {before}, not with {now}. Give the same "
                "settings, or move the folder ablation away."
            )
        return figures

    from localdit.pipelines import LocalDiTPipeline

    folder = args.output / "ablation/runs" / stem
    shutil.rmtree(folder, ignore_errors=True)  # of an interrupted run, whose time is unknown
    seconds = train(folder, name, seed, args)
    pipe = LocalDiTPipeline.from_pretrained(folder / "final")
    many = score.examples(args.count, score.CAPTIONS + seed)
    found = score.report(score.generate(pipe, many, seed, args), many, args)
    shares = [statistics.fmean(right) for right in found["right"].values()]
    values = (
        score.held_out_loss(pipe, score.examples(args.count, score.HELD_OUT)),
        100 * statistics.fmean(shares),
        found["distances"]["Fréchet distance"],
        seconds,
    )
    figures = dict(zip(DIGITS, values, strict=True))
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps({"settings": now, **figures}) + "\n", "utf-8")
    unfinished.replace(path)
    print(stem, json.dumps(figures), flush=True)
    return figures


def cell(values: Sequence[float], digits: int, sign: str = "") -> str:
    """Return "mean ± half an interval" of a figure over seeds, or the mean alone."""
    mean, half = interval(values)
    return f"{mean:{sign}.{digits}f}" + (f" ± {half:.{digits}f}" if half is not None else "")


def table(results: dict[str, list[Figures]]) -> str:
    """Return a Markdown table: means over seeds, and the loss minus that of the first variant.

    Args:
        results: the figures of each seed, by variant.
    """
    heads = ["variant", *DIGITS, f"loss, minus {BASE}"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, seeds in results.items():
        cells = [cell([seed[key] for seed in seeds], digits) for key, digits in DIGITS.items()]
        # Seed by seed: the same drawings and noise.
        pairs = zip(seeds, results[BASE], strict=True)
        less = cell([own["loss"] - base["loss"] for own, base in pairs], DIGITS["loss"], "+")
        cells.append("" if name == BASE else less)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    args = parse_args()
    args.output, args.pictures = args.output.absolute(), None
    (args.output / "ablation").mkdir(parents=True, exist_ok=True)
    results: dict[str, list[Figures]] = {name: [] for name in VARIANTS}
    for seed in args.seeds:
        for name, figures in {name: measure(name, seed, args) for name in VARIANTS}.items():
            results[name].append(figures)
        text = table(results)
        (args.output / "ablation.json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
        (args.output / "ablation.md").write_text(text, "utf-8")
        if args.page:
            write_into(args.page, "ablation", text)
    print(text)


if __name__ == "__main__":
    main()
