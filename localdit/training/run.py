"""The run folder: settings, metrics, checkpoints, validation pictures, the finished pipeline."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from localdit.images import image_grid, prepare_output_folder, save_image

if TYPE_CHECKING:
    from diffusers import DPMSolverMultistepScheduler

    from localdit.models import LocalDiTTransformer2DModel
    from localdit.pipelines import LocalDiTPipeline
    from localdit.training.components import Encoders


class RunFolder:
    """Where a run leaves what it makes.

    `config.json` holds the settings, `metrics.jsonl` a line for each log interval,
    `checkpoint-N/transformer` the averaged weights at step N, `validation/N.png` their pictures,
    and `final` the whole pipeline.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def create(self, settings: dict[str, Any]) -> None:
        """Make the folder and write the settings.

        Raises:
            FileExistsError: if there is a run in it already.
            OSError: if it can't be written to.
        """
        if self.path.exists() and any(self.path.iterdir()):
            raise FileExistsError(
                f"--output {self.path} is not empty. Choose another, or remove it."
            )
        prepare_output_folder(self.path)
        text = json.dumps(settings, indent=2, default=str)
        (self.path / "config.json").write_text(text + "\n", encoding="utf-8")

    def log(self, metrics: dict[str, float]) -> None:
        """Append a line to `metrics.jsonl`."""
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")

    def save_checkpoint(self, transformer: LocalDiTTransformer2DModel, step: int) -> None:
        """Write `checkpoint-N/transformer`, a Diffusers model folder."""
        with whole_folder(self.path / f"checkpoint-{step}") as folder:
            transformer.save_pretrained(folder / "transformer")

    def save_pictures(self, pipeline: LocalDiTPipeline, prompts: list[str], size: int, step: int,
                      seed: int) -> None:  # fmt: skip
        """Write `validation/N.png`: one picture of each prompt, from the same noise every time."""
        pipeline.set_progress_bar_config(disable=True)
        generators = [torch.Generator("cpu").manual_seed(seed) for _ in prompts]
        output = pipeline(prompts, height=size, width=size, generator=generators, return_dict=False)
        (self.path / "validation").mkdir(exist_ok=True)
        save_image(image_grid(output[0]), self.path / "validation" / f"{step:08d}.png")

    def save_pipeline(self, pipeline: LocalDiTPipeline) -> None:
        """Write `final`, a Diffusers pipeline folder."""
        with whole_folder(self.path / "final") as folder:
            pipeline.save_pretrained(folder)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to write into that appears at `path` once it is complete, or not at all."""
    unfinished = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


class Metrics:
    """Means over the steps since the last line was logged, and the pace."""

    def __init__(self, images_per_step: int) -> None:
        self.images_per_step = images_per_step
        self._reset()

    def _reset(self) -> None:
        self.steps, self.loss, self.grad_norm = 0, 0.0, 0.0
        self.since = time.perf_counter()

    def add(self, loss: float, grad_norm: float) -> None:
        """Count one optimizer step."""
        self.steps += 1
        self.loss += loss
        self.grad_norm += grad_norm

    def collect(self) -> dict[str, float]:
        """The means since the last call."""
        seconds = time.perf_counter() - self.since
        means = {
            "loss": self.loss / self.steps,
            "grad_norm": self.grad_norm / self.steps,
            "images_per_second": self.steps * self.images_per_step / seconds,
        }
        self._reset()
        return means


def require_finite(
    step: int, loss: torch.Tensor, grad_norm: torch.Tensor, scaled: bool = False
) -> None:
    """Stop a run before its weights are spoilt; `loss` and `grad_norm` are those of all processes.

    With scaled gradients (float16) an overflow is part of the scheme: the scaler skips the step.

    Raises:
        FloatingPointError: if the loss or the gradient is not finite.
    """
    if not torch.isfinite(loss) or not (scaled or torch.isfinite(grad_norm)):
        raise FloatingPointError(
            f"Step {step}: the loss is {loss.item():g} and the norm of its gradient "
            f"{grad_norm.item():g}. The weights are those before this step, and so are all "
            "checkpoints. Try a lower --learning-rate, or --mixed-precision bf16 or no."
        )


def make_pipeline(
    encoders: Encoders,
    transformer: LocalDiTTransformer2DModel,
    scheduler: DPMSolverMultistepScheduler,
) -> LocalDiTPipeline:
    """The pipeline that samples from a transformer in training."""
    from localdit.pipelines import LocalDiTPipeline

    return LocalDiTPipeline(*encoders, transformer=transformer, scheduler=scheduler)
