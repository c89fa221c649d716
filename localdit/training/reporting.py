"""Reports of a run: messages, files in its folder, trackers, and curves of the losses."""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate import Accelerator
from PIL import Image
from tqdm import tqdm

from localdit import parsing
from localdit.files import parse_json, whole_file
from localdit.training.data.buckets import describe_crops, left_out
from localdit.training.data.samples import Fault
from localdit.training.data.stage_data import StageData, unknown_captions
from localdit.training.run_folder import BROKEN, METRICS, SAMPLES, RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVES_EVERY = 20  # lines
SMOOTHING = 0.04  # share of the lines that a point of the smoothed curve averages
VALIDATION = "validation/{name}/loss"


class Reporter:
    """Reports of the main process; the other processes only log their samples."""

    def __init__(self, args: argparse.Namespace, accelerator: Accelerator, run: RunFolder) -> None:
        self.args, self.accelerator, self.run = args, accelerator, run
        self.main = accelerator.is_main_process
        self.lines = 0
        self.can_draw = importlib.util.find_spec("matplotlib") is not None
        self.step = 0
        self.bar: tqdm = tqdm(
            total=args.stages[-1].end, desc="Training", unit="step", disable=not self.main or None
        )  # None shows the bar on terminals only

    def begin(self, data: Sequence[StageData], step: int, tokenizer: Any = None) -> None:
        """Print the data of each stage, and start the trackers.

        Args:
            step: steps taken before.
            tokenizer: the tokenizer of the captions; None if all of them are encoded.
        """
        processes = self.accelerator.num_processes
        for stage, stage_data in zip(self.args.stages, data, strict=True):
            found = stage_data.found
            self.say(
                f"{stage}: {len(found.samples):,} samples ({left_out(stage_data.buckets)}, "
                f"{len(stage_data.withheld):,} held out, {found.faults.total:,} broken), "
                f"{len(stage_data.sizes)} buckets, {stage.batch_size} x {processes} processes on "
                f"{self.accelerator.device.type} x {stage.gradient_accumulation_steps} = "
                f"{stage.global_batch(processes)} samples to a step"
            )
            crops = describe_crops(found.samples, stage_data.sizes, stage_data.buckets)
            unknown = ""
            if self.main and tokenizer is not None:
                unknown = unknown_captions(found.samples, tokenizer)
            texts = [found.unused(), *crops.splitlines()[:1], unknown, str(found.faults)]
            for text in filter(None, texts):
                self.say(text)
        if not self.can_draw:
            self.say("curves.png needs matplotlib: pip install matplotlib")
        self.step = step
        self.bar.update(step)
        self._try("start the trackers", self._start_trackers)

    def _start_trackers(self) -> None:
        settings = {
            name: value if isinstance(value, int | float | str | bool) else str(value)
            for name, value in vars(self.args).items()
        }
        wandb = {"dir": str(self.run.path.absolute()), "name": self.run.path.name}
        if self.main and self.args.use_wandb:
            wandb |= {"id": self.run.wandb_id(), "resume": "allow"}
        self.accelerator.init_trackers("localdit", settings, {"wandb": wandb})

    def say(self, text: str) -> None:
        """Print a message above the progress bar."""
        if self.main:
            _say(text)

    def line(self, line: dict[str, Any]) -> None:
        """Log a line of metrics."""
        step = int(line["step"])
        values = {name: value for name, value in line.items() if name != "step"}
        self._try("log to the trackers", lambda: self.accelerator.log(values, step=step))
        if not self.main:
            return
        self._try("write to the log", lambda: self.run.log(line))
        if "loss" in line:
            shown = {
                "loss": f"{line['loss']:.4f}",
                "images_per_s": f"{line['images_per_second']:.1f}",
                "lr": f"{line['learning_rate']:.2g}",
                "grad_norm": f"{line['grad_norm']:.3g}",
            }
            self.bar.set_postfix(shown)
            if self.bar.disable:  # not a terminal, but perhaps a log
                text = ", ".join(f"{name} {value}" for name, value in shown.items())
                self.say(f"step {step} of {self.args.stages[-1].end}: {text}")
        if self.lines % CURVES_EVERY == 0:
            self._draw_curves()
        self.lines += 1

    def _draw_curves(self) -> None:
        """Draw `curves.png`, once a loss has been logged."""
        metrics = self.run.path / METRICS

        def draw() -> None:
            if metrics.is_file() and b'"loss"' in metrics.read_bytes():
                draw_curves(metrics, self.run.path / "curves.png")

        if self.can_draw:
            self._try("draw curves.png", draw)

    def _try(self, what: str, action: Callable[[], object]) -> None:
        """Make a report, which training can do without: an error only causes a message."""
        try:
            action()
        except Exception as error:  # trackers and Matplotlib raise anything
            _say(f"Could not {what}: {str(error) or repr(error)}")  # every process has its samples

    def samples(self, step: int, ids: Sequence[str], loss: float | None) -> None:
        """Log the samples of this process in a step, and the loss of the step."""
        name = SAMPLES.format(rank=self.accelerator.process_index)
        line = {"step": step, "loss": loss, "samples": list(ids)}
        self._try("write to the log", lambda: self.run.log(line, name))

    def broken(self, fault: Fault, step: int) -> None:
        """Log a sample that turned out to be broken when it was read for a step, or after it."""
        if self.main:
            line = {"step": step, **fault._asdict()}
            self._try("write to the log", lambda: self.run.log(line, BROKEN))

    def pictures(self, images: Sequence[Image.Image], step: int) -> None:
        """Save validation pictures, and log them to the trackers."""
        if not self.main:
            return
        self._try("save pictures", lambda: self.run.save_pictures(images, step))
        self._try("log to the trackers", lambda: self._track_pictures(images, step))

    def _track_pictures(self, images: Sequence[Image.Image], step: int) -> None:
        """Log validation pictures to the trackers."""
        for tracker in self.accelerator.trackers:
            named = dict(zip(self.args.validation_prompts, images, strict=True))
            if tracker.name == "wandb":
                tracker.log_images({"validation": list(named.values())}, step=step)
            elif tracker.name == "tensorboard":
                arrays = np.stack([np.asarray(image) for image in images])
                tracker.log_images({"validation": arrays}, step=step, dataformats="NHWC")

    def advance(self) -> None:
        """Advance the progress bar by a step."""
        self.step += 1
        self.bar.update()

    def close(self) -> None:
        """Draw the curves one last time, and end the trackers."""
        if self.main:
            self._draw_curves()
        self.bar.close()
        self._try("end the trackers", self.accelerator.end_training)


def _say(text: str) -> None:
    with tqdm.external_write_mode():
        parsing.say(text)


def draw_curves(metrics_jsonl: Path, png: Path) -> None:
    """Plot the metrics of a run. The file is written whole or not at all.

    The upper plot shows the training loss of each line, the smoothed training loss, and the
    validation losses of model and average. The lower plot shows the learning rate. An incomplete
    last line is left out.

    Args:
        metrics_jsonl: file with a JSON object per line: `step` and any of `loss`, `learning_rate`,
            `validation/model/loss` and `validation/ema/loss`.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Curves need matplotlib: pip install -r requirements-train.txt"
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

    with whole_file(png) as file:
        figure.savefig(file, format="png", dpi=100)


def read_metrics(metrics_jsonl: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics file, without an incomplete last one.

    A run that resumes from an earlier checkpoint repeats steps. So a line replaces all lines above
    it with later steps.
    """
    texts = metrics_jsonl.read_bytes().splitlines()
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(texts, start=1):
        try:
            line = parse_json(text, f"{metrics_jsonl}, line {number},")
        except ValueError:
            if number == len(texts):
                break
            raise
        while lines and lines[-1].get("step", 0) > line.get("step", 0):
            lines.pop()
        lines.append(line)
    return lines


def smoothed(values: Sequence[float]) -> list[float]:
    """Return the mean of a window around each value, which holds a share `SMOOTHING` of them.

    The window is smaller near the start, so a steep fall keeps its place. It is cut off at the end.
    Values that are not finite are left out.
    """
    reach = int(len(values) * SMOOTHING / 2)
    means = []
    for i in range(len(values)):
        near = min(reach, i)
        window = [value for value in values[i - near : i + near + 1] if math.isfinite(value)]
        means.append(sum(window) / len(window) if window else math.nan)
    return means


def _series(lines: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Return steps and values of the lines that have the value."""
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
    """Cut off a few outliers, such as the start of training, which would flatten the rest."""
    finite = sorted(filter(math.isfinite, training))
    if len(finite) < 20:
        return
    kept = [*finite[: math.ceil(0.98 * len(finite))], *filter(math.isfinite, validation)]
    low, high = min(kept), max(kept)
    room = 0.15 * (high - low)
    if low < high and high + 2 * room < finite[-1]:
        axes.set_ylim(low - room, high + 2 * room)
