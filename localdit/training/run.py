"""The run folder: options, metrics, checkpoints, validation pictures, the finished pipeline."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from localdit.images import image_grid, prepare_output_folder, save_image
from localdit.training.checkpointing import (
    DamagedCheckpoint,
    checkpoints,
    new_checkpoint,
    newest_checkpoint,
    remove_old_checkpoints,
    remove_unfinished,
    set_aside_after,
    step_of_checkpoint,
    verify_checkpoint,
    whole_folder,
)
from localdit.training.curves import draw_curves

if TYPE_CHECKING:
    from localdit.training.pipeline_folder import ResultFolder
    from localdit.training.state import Snapshot

RESUME_HINT = "go on with it by --resume auto, choose another, or remove it"


class RunFolder:
    """Where a run leaves what it makes.

    `config.json` holds the options, `metrics.jsonl` a line for each log interval, `curves.png`
    their picture, `checkpoint-N` the state at step N, `validation/N.png` pictures, and `final` the
    pipeline. Each checkpoint is the folder of a pipeline as well, with the averaged weights; what
    else training needs to go on is in its folder `training`. Of a run that trains adapters, both
    hold the adapters instead.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self, resume: str | None) -> Path | None:
        """Prepare the folder and choose the checkpoint to go on from.

        Args:
            resume: folder of a checkpoint, "auto", or None for a new run.

        Returns:
            The checkpoint, or None where training starts anew.

        Raises:
            FileExistsError: if there is a run in the folder and none is to be resumed.
            ValueError: if the checkpoint is damaged, or "auto" finds none that is sound.
            OSError: if the folder can't be written to.
        """
        if resume is None and self.path.exists() and any(self.path.iterdir()):
            raise FileExistsError(f"--output {self.path} is not empty: {RESUME_HINT}.")
        checkpoint = self._find(resume) if resume else None
        prepare_output_folder(self.path)
        remove_unfinished(self.path)
        if checkpoint is not None:
            for told in set_aside_after(self.path, step_of_checkpoint(checkpoint)):
                print(told)
        return checkpoint

    def save_options(self, options: Mapping[str, Any]) -> None:
        """Write `config.json`."""
        _write_whole(self.path / "config.json", json.dumps(options, indent=2) + "\n")

    def _find(self, resume: str) -> Path | None:
        """The checkpoint that `--resume` names; says which ones were passed over."""
        if resume != "auto":
            try:
                verify_checkpoint(Path(resume))
            except DamagedCheckpoint as error:
                raise ValueError(f"--resume {resume} can't be resumed: {error}.") from None
            return Path(resume)
        checkpoint, passed_over = newest_checkpoint(self.path)
        for reason in passed_over:
            print(reason)
        if checkpoint is None and checkpoints(self.path):
            raise ValueError(
                f"None of the checkpoints in {self.path} is sound: "
                f"{'; '.join(passed_over)}. Remove them to start anew, or restore one."
            )
        return checkpoint

    def forget_after(self, step: int) -> None:
        """Drop the lines that a run had logged after the checkpoint it goes on from."""
        for file in self.path.glob("*.jsonl"):
            lines = file.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _step_of(line) <= step]
            _write_whole(file, "".join(f"{line}\n" for line in kept))

    def log(self, line: Mapping[str, Any], name: str = "metrics.jsonl") -> None:
        """Append a line, an object with a `step`, to a file of such lines."""
        with open(self.path / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def wandb_id(self) -> str:
        """What Weights & Biases knows the run by, so that a resumed one goes on in its place."""
        file = self.path / "wandb-id.txt"
        if not file.is_file():
            _write_whole(file, secrets.token_hex(8))
        return file.read_text(encoding="utf-8")

    def draw_curves(self) -> None:
        """Draw `curves.png` from what was logged so far, if that is a loss at least."""
        metrics = self.path / "metrics.jsonl"
        if metrics.is_file() and '"loss"' in metrics.read_text(encoding="utf-8"):
            draw_curves(metrics, self.path / "curves.png")

    def save_checkpoint(self, result: ResultFolder, snapshot: Snapshot, keep: int) -> None:
        """Write a checkpoint, prove it, and only then delete the oldest ones.

        Raises:
            OSError, ValueError: if it can't be written; the ones before are untouched.
        """
        step = snapshot.values["progress"]["step"]
        try:
            with new_checkpoint(self.path, step) as folder:
                result.write(folder, snapshot.averages)
                snapshot.write(folder / "training")
        except Exception as error:  # safetensors, for one, has an error of its own for a full disk
            raise OSError(
                f"The checkpoint of step {step} could not be written to {self.path}: {error}. "
                "Those before it are untouched: make room, and go on with --resume auto."
            ) from error
        remove_old_checkpoints(self.path, keep)

    def save_pictures(self, images: Sequence[Image.Image], step: int) -> None:
        """Write `validation/N.png`, the pictures side by side."""
        (self.path / "validation").mkdir(exist_ok=True)
        save_image(image_grid(images), self.path / "validation" / f"{step:08d}.png")

    def save_final(self, result: ResultFolder, averages: Mapping[str, Any]) -> None:
        """Write `final`, the folder of the pipeline or of the adapters."""
        with whole_folder(self.path / "final") as folder:
            result.write(folder, averages)


def _step_of(line: str) -> float:
    """The step of a line; none for the broken line that a kill leaves behind."""
    try:
        return json.loads(line)["step"]
    except (KeyError, TypeError, ValueError):
        return float("inf")


def _write_whole(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def link_or_copy(folder: Path, target: Path) -> None:
    """Have `target` stand for a folder: a link where the file system has them, else a copy."""
    try:
        target.symlink_to(folder, target_is_directory=True)
    except OSError:
        shutil.copytree(folder, target)
