"""How a run tells the world how it goes: the terminal, files in its folder, trackers."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

from accelerate import Accelerator
from PIL import Image
from tqdm import tqdm

from localdit.machine import hidden
from localdit.training.data.faults import Fault
from localdit.training.data.stage_data import StageData
from localdit.training.run import RunFolder

CURVES_EVERY = 20  # lines


class Reporter:
    """Reports of the main process; in the others nothing happens, but for the log of samples."""

    def __init__(self, args: argparse.Namespace, accelerator: Accelerator, run: RunFolder) -> None:
        self.args, self.accelerator, self.run = args, accelerator, run
        self.main = accelerator.is_main_process
        self.lines = 0
        self.can_draw = importlib.util.find_spec("matplotlib") is not None
        self.step = 0
        self.bar: tqdm = tqdm(
            total=args.stages[-1].end, desc="Training", unit="step", disable=hidden(not self.main)
        )

    def begin(self, data: Sequence[StageData], step: int) -> None:
        """Say what is trained on, and where the run stands; start the trackers."""
        processes = self.accelerator.num_processes
        for stage, found in zip(self.args.stages, data, strict=True):
            left_out = int((found.buckets < 0).sum())
            self.say(
                f"{stage}: {len(found.found.samples):,} samples ({left_out:,} too small, "
                f"{len(found.held_out):,} held out, {found.found.faults.total:,} broken), "
                f"{len(found.sizes)} buckets, {stage.batch_size} x {processes} processes on "
                f"{self.accelerator.device.type} x {stage.gradient_accumulation_steps} = "
                f"{stage.global_batch(processes)} samples to a step"
            )
            if found.found.faults.total:
                self.say(str(found.found.faults))
        if self.main:
            self.run.forget_after(step)
        if not self.can_draw:
            self.say("There will be no curves.png without matplotlib: pip install matplotlib")
        self.step = step
        self.bar.update(step)
        settings = {
            name: value if isinstance(value, int | float | str | bool) else str(value)
            for name, value in vars(self.args).items()
        }
        wandb = {"dir": str(self.run.path.absolute()), "name": self.run.path.name}
        if self.main and self.args.use_wandb:
            wandb |= {"id": self.run.wandb_id(), "resume": "allow"}
        self.accelerator.init_trackers("localdit", settings, {"wandb": wandb})

    def say(self, text: str) -> None:
        """Print, above the progress bar."""
        if self.main:
            tqdm.write(text)

    def line(self, line: dict[str, Any]) -> None:
        """Log a line of metrics."""
        step = int(line["step"])
        self.accelerator.log({k: v for k, v in line.items() if k != "step"}, step=step)
        if not self.main:
            return
        self._write(lambda: self.run.log(line))
        if "loss" in line:
            shown = {
                "loss": f"{line['loss']:.4f}",
                "images_per_s": f"{line['images_per_second']:.1f}",
                "lr": f"{line['learning_rate']:.2g}",
                "grad_norm": f"{line['grad_norm']:.3g}",
            }
            self.bar.set_postfix(shown)
            if self.bar.disable:  # there is no terminal, but perhaps a log
                told = ", ".join(f"{name} {value}" for name, value in shown.items())
                self.say(f"step {step} of {self.args.stages[-1].end}: {told}")
        if self.lines % CURVES_EVERY == 0:
            self._draw_curves()
        self.lines += 1

    def _draw_curves(self) -> None:
        if self.can_draw:
            self._write(self.run.draw_curves)

    def _write(self, action: Callable[[], object]) -> None:
        """Write something that training can do without: a full disk is told, and no more."""
        try:
            action()
        except OSError as error:
            self.say(f"This could not be logged: {error}")

    def samples(self, step: int, ids: Sequence[str], loss: float | None) -> None:
        """Log which samples this process saw in a step, and the loss of the step."""
        name = f"samples-{self.accelerator.process_index}.jsonl"
        line = {"step": step, "loss": loss, "samples": list(ids)}
        self._write(lambda: self.run.log(line, name))

    def broken(self, fault: Fault) -> None:
        """Log a sample that turned out to be broken when it was read."""
        if self.main:
            line = {"step": self.step + 1, **fault._asdict()}
            self._write(lambda: self.run.log(line, "broken.jsonl"))

    def pictures(self, images: Sequence[Image.Image], step: int) -> None:
        """Save validation pictures, and show them to the trackers."""
        if not self.main:
            return
        self._write(lambda: self.run.save_pictures(images, step))
        for tracker in self.accelerator.trackers:
            named = dict(zip(self.args.validation_prompts, images, strict=True))
            if tracker.name == "wandb":
                tracker.log_images({"validation": list(named.values())}, step=step)
            elif tracker.name == "tensorboard":
                import numpy as np

                arrays = np.stack([np.asarray(image) for image in images])
                tracker.log_images({"validation": arrays}, step=step, dataformats="NHWC")

    def advance(self) -> None:
        """Move the progress bar on by a step."""
        self.step += 1
        self.bar.update()

    def close(self) -> None:
        """Draw the curves a last time, and end the trackers."""
        if self.main:
            self._draw_curves()
        self.bar.close()
        self.accelerator.end_training()
