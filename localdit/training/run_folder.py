"""The run folder: options, metrics, checkpoints, validation pictures, the finished pipeline."""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from localdit.checkpoint.reading import is_finite
from localdit.files import (
    LOCK,
    has_files,
    lock_folder,
    read_json,
    remove_folder,
    remove_unfinished,
    write_json,
    write_whole,
)
from localdit.images import image_grid, prepare_output_folder, save_image
from localdit.parsing import say
from localdit.training.checkpointing import (
    FINAL,
    MANIFEST,
    DamagedCheckpoint,
    checkpoints,
    newest_checkpoint,
    numbered,
    remove_old_checkpoints,
    set_aside_after,
    verified_folder,
    verify_checkpoint,
)
from localdit.training.data.samples import Fault
from localdit.training.options import guidance_beside
from localdit.training.parser import DISTIL, METHOD_OPTIONS
from localdit.training.post_hoc_ema import SNAPSHOT, write_snapshot
from localdit.training.stages import STAGE_OPTIONS

if TYPE_CHECKING:
    import torch

    from localdit.training.results import ResultFolder
    from localdit.training.state import Snapshot

TEACHER_SHA256 = "teacher_sha256"
# A run with another value of these options would be a different run.
FIXED = (
    *METHOD_OPTIONS, TEACHER_SHA256, "prediction_type", "seed", "optimizer", "post_hoc_ema",
    "new_latents", "lora_rank", "lora_alpha", "lora_target_modules",
)  # fmt: skip
IGNORED = ("resume", "output")
# Ends of the names of values that come from elsewhere unless given. Earlier versions did not save
# them.
RESOLVED = ("mixed_precision", "_sha256")
METRICS, BROKEN, SAMPLES = "metrics.jsonl", "broken.jsonl", "samples-{rank}.jsonl"
_LOG = re.compile(r"(metrics|broken|samples-\d+)\.jsonl")


class RunFolder:
    """The folder that a run writes to.

    `config.json` holds the options, `metrics.jsonl` a line for each log interval, `curves.png`
    plots of these lines, `checkpoint-N` the state at step N, `ema-N` a snapshot for post-hoc EMA,
    `validation/N.png` pictures, and `final` the pipeline. Each checkpoint is also the folder of a
    pipeline with the averaged weights. Its folder `training` holds the rest of the state, for
    resuming. In a run that trains adapters, checkpoints and `final` hold the adapters instead of a
    pipeline.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self, resume: str | None) -> Path | None:
        """Prepare the folder, lock it for this process, and choose the checkpoint to resume from.

        Checkpoints and logs stay as they are until `begin`.

        Args:
            resume: folder of a checkpoint, "auto", or None for a new run.

        Returns:
            The checkpoint, or None if training starts from the beginning.
        """
        if not (self.path / LOCK).is_file():  # leave a folder without a run as it is
            self._require_own(resume)
        prepare_output_folder(self.path)
        lock_folder(
            self.path,
            f"Another process is training into --output {self.path}. Wait for it or stop it, or "
            "choose another folder.",
        )
        self._require_own(resume)
        checkpoint = self._find(resume) if resume else None
        remove_unfinished(self.path)
        return checkpoint

    def begin(self, options: Mapping[str, Any], step: int) -> None:
        """Write `config.json`, and put away what an earlier run left after a step.

        Later checkpoints and results are set aside. Later snapshots for post-hoc EMA and validation
        pictures are deleted, and lines of the logs are dropped if they are later or damaged.
        """
        for message in set_aside_after(self.path, step):
            say(message)
        for number, folder in numbered(self.path, SNAPSHOT):
            if number > step:
                remove_folder(folder)
        for picture in (self.path / "validation").glob("*.png"):
            if re.fullmatch(r"[0-9]{8,}", picture.stem) and int(picture.stem) > step:
                picture.unlink()
        for file in [file for file in self.path.iterdir() if _LOG.fullmatch(file.name)]:
            lines = [(_step_of(line), line) for line in file.read_bytes().splitlines()]
            if damaged := sum(found is None for found, _ in lines):
                say(f"{file.name}: damaged or incomplete lines are dropped: {damaged}")
            kept = [line for found, line in lines if found is not None and found <= step]
            write_whole(file, b"".join(line + b"\n" for line in kept))
        write_json(self.path / "config.json", options)

    def holds(self, checkpoint: Path) -> bool:
        """Return whether a checkpoint lies in this folder."""
        return checkpoint.absolute().parent.resolve() == self.path.resolve()

    def broken(self) -> set[Fault]:
        """Return the samples that `broken.jsonl` lists, after `begin`."""
        path = self.path / BROKEN
        lines = map(json.loads, path.read_bytes().splitlines() if path.is_file() else [])
        return {Fault(*(str(line.get(name)) for name in Fault._fields)) for line in lines}

    def _require_own(self, resume: str | None) -> None:
        """Raise FileExistsError if the folder holds something else than the run to resume."""
        if not has_files(self.path):
            return
        if not self._holds_run():
            raise FileExistsError(
                f"--output {self.path} is not empty and holds no run. Choose another folder, or "
                "empty it."
            )
        if resume is None:
            raise FileExistsError(
                f"--output {self.path} is not empty. Resume the run in it with --resume auto, "
                "choose another folder, or remove it."
            )
        if resume != "auto" and not self.holds(Path(resume)):
            raise FileExistsError(
                f"--output {self.path} holds another run than --resume {resume}. Resume the run "
                "in it with --resume auto, or choose a new folder, or that of the checkpoint."
            )

    def _holds_run(self) -> bool:
        """Return whether the folder has a run's options, or a checkpoint.

        Every Diffusers folder has a `config.json`, and other programs also name checkpoints so.
        """
        if any((folder / MANIFEST).is_file() for _, folder in checkpoints(self.path)):
            return True
        try:
            return read_json(self.path / "config.json").keys() >= {"data_root", "output"}
        except (FileNotFoundError, ValueError):
            return False

    def _find(self, resume: str) -> Path | None:
        """Return the checkpoint that `--resume` names, and print which ones were skipped."""
        if resume != "auto":
            try:
                manifest = verify_checkpoint(Path(resume))
            except DamagedCheckpoint as error:
                raise ValueError(f"--resume {resume} can't be resumed: {error}.") from None
            if not any(name.startswith("training/") for name in manifest.sums):
                raise ValueError(
                    f"--resume {resume} can't be resumed: it is a result, without the state of "
                    "the training. Name a folder checkpoint-STEP of the run, or give --resume auto."
                )
            own = [folder.resolve() for _, folder in checkpoints(self.path)]
            if self.holds(Path(resume)) and Path(resume).resolve() not in own:
                raise ValueError(
                    f"--resume {resume} can't be resumed in its run, which goes on from its "
                    "folders checkpoint-STEP alone. To branch off, give a new --output."
                )
            return Path(resume)
        checkpoint, skipped = newest_checkpoint(self.path)
        for reason in skipped:
            say(reason)
        if checkpoint is None and checkpoints(self.path):
            raise ValueError(
                f"All checkpoints in {self.path} are damaged: "
                f"{'; '.join(skipped)}. Remove them to start again, or restore one."
            )
        return checkpoint

    def log(self, line: Mapping[str, Any], name: str = METRICS) -> None:
        """Append a line, a JSON object with a `step`, to a file.

        Raises:
            OSError: if it can't be written; no part of it is left.
        """
        path, text = self.path / name, json.dumps(line) + "\n"
        size = path.stat().st_size if path.exists() else 0
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(text)
        except OSError:
            if path.exists():
                os.truncate(path, size)
            raise

    def wandb_id(self) -> str:
        """Return the run's identifier at Weights & Biases, the same when it is resumed."""
        file = self.path / "wandb-id.txt"
        if not file.is_file():
            write_whole(file, secrets.token_hex(8))
        return file.read_text(encoding="utf-8")

    def save_checkpoint(self, result: ResultFolder, snapshot: Snapshot, keep: int | None) -> None:
        """Write a checkpoint, verify it, and only then delete the oldest ones.

        A snapshot for post-hoc EMA is written before it, and stays.

        Args:
            result: writes the averages.
            snapshot: the state.
            keep: how many checkpoints are kept, at least 2; None for all.

        Raises:
            OSError: if it can't be written; earlier checkpoints are untouched.
            ValueError: if weights are not finite; nothing is written.
        """
        step = snapshot.values["progress"]["step"]
        _require_finite(step, snapshot.weights())
        with self._advice(f"The checkpoint of step {step}"):
            if snapshot.profiles and (updates := snapshot.values["ema_updates"]):
                with verified_folder(self.path / f"{SNAPSHOT}-{step}", step) as folder:
                    write_snapshot(folder, snapshot.profiles, updates, result.write)
            with verified_folder(self.path / f"checkpoint-{step}", step) as folder:
                result.write(folder, snapshot.averages)
                snapshot.write(folder / "training")
        if keep is not None:
            remove_old_checkpoints(self.path, keep)

    def save_pictures(self, images: Sequence[Image.Image], step: int) -> None:
        """Write `validation/N.png`, the pictures side by side."""
        (self.path / "validation").mkdir(exist_ok=True)
        save_image(image_grid(images), self.path / "validation" / f"{step:08d}.png")

    def save_final(
        self, result: ResultFolder, averages: Mapping[str, torch.Tensor], step: int
    ) -> None:
        """Write `final`, the folder of the pipeline or of the adapters, with its manifest.

        Raises:
            OSError: if it can't be written.
            ValueError: if weights are not finite; nothing is written.
        """
        _require_finite(step, averages.items())
        with (
            self._advice(f"The result after step {step}"),
            verified_folder(self.path / FINAL, step) as folder,
        ):
            result.write(folder, averages)

    @contextmanager
    def _advice(self, what: str) -> Iterator[None]:
        """Raise OSError with advice if something can't be written, or reads back differently."""
        try:
            yield
        except (OSError, DamagedCheckpoint) as error:
            raise OSError(
                f"{what} could not be written to {self.path}: {error}. Earlier checkpoints are "
                "untouched: free some space, and resume with --resume auto."
            ) from error


def _require_finite(step: int, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Raise ValueError if weights after a step are not finite: the training diverged."""
    for name, tensor in weights:
        if not is_finite(tensor):
            raise ValueError(
                f"The weights after step {step} are not finite (first {name!r}), so they are not "
                "saved: the training diverged. Resume from an earlier checkpoint with --resume "
                "auto, or start again, with a lower --learning-rate or --weight-decay."
            )


def _step_of(line: bytes) -> int | None:
    """Return the step of a line; None if it has none, as what a killed run was writing."""
    try:
        step = json.loads(line)["step"]
    except (KeyError, RecursionError, TypeError, ValueError):
        return None
    return step if isinstance(step, int) else None


def options_of(
    args: argparse.Namespace,
    fingerprints: Mapping[str, str],
    settings: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Return the options as plain values for JSON; those of a single stage are its own.

    Args:
        fingerprints: SHA-256 of each frozen model, by its name; the options name only paths.
        settings: the settings of frozen models, by their names. They become `MODEL.SETTING`.
    """
    stages = [vars(stage) for stage in args.stages]
    if len(stages) == 1:
        plain = vars(args) | {name: stages[0][name] for name in STAGE_OPTIONS} | {"stages": None}
    else:
        plain = vars(args) | {"stages": stages}
    plain |= {_sha256(model): fingerprint for model, fingerprint in fingerprints.items()}
    plain |= {f"{model}.{name}": found[name] for model, found in settings.items() for name in found}
    return json.loads(json.dumps(plain, default=str))


def _sha256(model: str) -> str:
    """Return the name of a frozen model's fingerprint among the options."""
    return f"{model.replace(' ', '_')}_sha256"


def changed_options(
    checkpoint: Path, before: Mapping[str, Any], now: Mapping[str, Any]
) -> list[tuple[str, Any, Any]]:
    """Return name, old and new value of each option that differs from the saved run's.

    Values that an earlier version left open are taken to be as they are now.
    """
    before = _complete(before)
    names = sorted((before.keys() | now.keys()) - set(IGNORED))
    changes = [
        (name, before.get(name), now.get(name))
        for name in names
        if before.get(name) != now.get(name)
        and not (name.endswith(RESOLVED) and before.get(name) is None)
        and not ("." in name and (name not in before or name not in now))  # of another version
    ]
    changed = {name: (old, new) for name, old, new in changes}
    settings = [name for name in changed if name.startswith(("teacher.", "transformer."))]
    for name in (*FIXED, *settings):  # in this order, as some follow from others
        moved = name == "teacher" and TEACHER_SHA256 in before  # its weights count, not its path
        if name in changed and not moved:
            raise ValueError(_another_run(checkpoint, name, *changed[name], before))
    return changes


def _complete(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return saved options with the values that earlier versions left to defaults."""
    options = {"method": "fine-tuning", **saved}  # older runs had no --method
    if options.get("lora_alpha") is None:
        options["lora_alpha"] = options.get("lora_rank")
    if options["method"] == DISTIL and options.get("teacher_guidance_scale") is None:
        options["teacher_guidance_scale"] = guidance_beside(Path(options["teacher"]))
    return options


def _another_run(checkpoint: Path, name: str, old: Any, new: Any, before: Mapping[str, Any]) -> str:
    """Return the message about an option that may not change."""
    if name == TEACHER_SHA256:
        return (
            f"{checkpoint} is of a run whose teacher had other weights than --teacher has now "
            f"(SHA-256 {old}, now {new}). Resume it with the same teacher, or start a new run in "
            "another --output."
        )
    if "." in name:
        model, setting = name.split(".")
        return (
            f"{checkpoint} is of a run whose {model} had {setting} {old}, but --{model} has {new} "
            "now. Resume it with the setting that it had, or start a new run in another --output."
        )
    flag = f"--{name.replace('_', '-')}"
    was, given = (
        f"without {flag}" if value is None else f"with {flag}" + f" {value}" * (value is not True)
        for value in (old, new)
    )
    new_run = f" from its weights with --transformer {checkpoint}/transformer"
    if before.get("lora_rank") is not None:
        new_run = " in another --output"
    return (
        f"{checkpoint} is of a run {was}, not {given}. Resume it {was}, or start a new run"
        f"{new_run}."
    )
