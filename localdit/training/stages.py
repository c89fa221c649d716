"""The stages of a run, each with its own data, sizes and learning rate."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from localdit.files import parse_json_list


@dataclass(frozen=True)
class Stage:
    """A part of a run, with the options of the command line."""

    index: int  # from 0
    first_step: int  # optimizer steps taken before it
    data_root: str
    image_size: int
    batch_size: int
    gradient_accumulation_steps: int
    max_train_steps: int
    learning_rate: float
    lr_schedule: str
    warmup_steps: int

    @property
    def end(self) -> int:
        """Optimizer steps taken by the end of the stage."""
        return self.first_step + self.max_train_steps

    def global_batch(self, num_processes: int) -> int:
        """Return the number of samples in an optimizer step."""
        return num_processes * self.batch_size * self.gradient_accumulation_steps

    def warning(self) -> str:
        """Return a warning if the stage ends before its warm-up; "" otherwise."""
        if self.warmup_steps < self.max_train_steps:
            return ""
        return (
            f"warning: --warmup-steps is {self.warmup_steps:,}, and stage {self.index + 1} has "
            f"{self.max_train_steps:,} steps, so the learning rate does not reach "
            f"{self.learning_rate:g}"
        )

    def __str__(self) -> str:
        return (
            f"stage {self.index + 1}: {self.image_size} pixels, steps {self.first_step + 1:,} to "
            f"{self.end:,}, learning rate {self.learning_rate:g}, {self.data_root}"
        )


STAGE_OPTIONS = tuple(field.name for field in fields(Stage))[2:]


def read_stages(path: Path) -> list[dict[str, Any]]:
    """Read the options that each stage changes, by name.

    The file is a JSON list of objects such as `{"image-size": 256, "max-train-steps": 10000}`.
    """
    try:
        stages = parse_json_list(path.read_bytes(), "the file")
    except (OSError, ValueError) as error:
        raise ValueError(f"--stages {path} can't be read: {error}") from None
    if not stages or not all(isinstance(stage, tuple) for stage in stages):
        raise ValueError(
            f'--stages {path}: expected a list such as [{{"image-size": 256}}, '
            '{"image-size": 512}]'
        )
    changes: list[dict[str, Any]] = []
    for number, stage in enumerate(stages, start=1):
        changes.append({})
        for given, value in stage:
            name = given.replace("-", "_")
            if name in changes[-1]:
                raise ValueError(
                    f"--stages {path}, stage {number}: {given!r} is given twice; keep one of them."
                )
            if name not in STAGE_OPTIONS:
                known = ", ".join(option.replace("_", "-") for option in STAGE_OPTIONS)
                raise ValueError(
                    f"--stages {path}, stage {number}: {name!r} is not an option of a stage. "
                    f"The options are {known}."
                )
            changes[-1][name] = value
    return changes


def stage_of_step(stages: list[Stage], step: int) -> Stage:
    """Return the stage of the step after `step` steps; the last one if all are over."""
    return next((stage for stage in stages if step < stage.end), stages[-1])
