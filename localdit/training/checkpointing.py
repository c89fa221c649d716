"""Reliable checkpoints: written whole, verified by checksums, and deleted last.

A checkpoint is a folder, complete as soon as it has its name (see `localdit.files`). Its
`manifest.json` holds the SHA-256 of each file, so later damage is detected before it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from localdit.files import flush_folder, remove_folder, whole_folder

MANIFEST = "manifest.json"
FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d+)")
_UNFINISHED = re.compile(r"\..+\.tmp")
_CHUNK = 4 * 2**20  # bytes


class DamagedCheckpoint(ValueError):
    """A checkpoint that differs from what was written."""


@contextmanager
def new_checkpoint(run: Path, step: int) -> Iterator[Path]:
    """Make a folder that becomes `run/checkpoint-STEP`, and add its manifest.

    An earlier checkpoint of the same step is replaced.

    Raises:
        OSError: if something can't be written. Nothing of the folder is left then.
        DamagedCheckpoint: if the files read back differently. Nothing of the folder is left then.
    """
    with whole_folder(run / f"checkpoint-{step}") as folder:
        yield folder
        sums = {str(file.relative_to(folder)): _sha256(file) for file in _files(folder)}
        manifest = {"format": FORMAT, "step": step, "sha256": sums}
        text = json.dumps(manifest, indent=2) + "\n"
        (folder / MANIFEST).write_text(text, encoding="utf-8")
        flush_folder(folder)
        verify_checkpoint(folder)


def verify_checkpoint(folder: Path) -> None:
    """Check every byte of a checkpoint.

    Raises:
        DamagedCheckpoint: if a file is missing or altered, or the manifest can't be read.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise DamagedCheckpoint(f"it has no {MANIFEST}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version, sums = manifest["format"], dict(manifest["sha256"])
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedCheckpoint(f"its {MANIFEST} can't be read ({error!r})") from None
    if version != FORMAT:
        raise DamagedCheckpoint(f"it has format {version}, this version reads {FORMAT}")
    found = {str(file.relative_to(folder)): file for file in _files(folder)}
    if missing := sums.keys() - found.keys():
        raise DamagedCheckpoint(f"it lacks {min(missing)}")
    for name, expected in sums.items():
        if _sha256(found[name]) != expected:
            raise DamagedCheckpoint(f"{name} is damaged: its SHA-256 differs from the manifest")


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """Return step and folder of each checkpoint, including damaged ones, the newest first."""
    if not run.is_dir():
        return []
    named = ((_NAME.fullmatch(folder.name), folder) for folder in run.iterdir())
    found = [(int(match[1]), folder) for match, folder in named if match and folder.is_dir()]
    return sorted(found, reverse=True)


def step_of_checkpoint(folder: Path) -> int:
    """Return the step of a verified checkpoint, whatever its name."""
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["step"]


def newest_checkpoint(run: Path) -> tuple[Path | None, list[str]]:
    """Return the newest undamaged checkpoint, and a reason for each newer one that was skipped."""
    skipped = []
    for _, folder in checkpoints(run):
        try:
            verify_checkpoint(folder)
        except (DamagedCheckpoint, OSError) as error:
            skipped.append(f"{folder.name} is skipped: {error}")
            continue
        return folder, skipped
    return None, skipped


def set_aside_after(run: Path, step: int) -> list[str]:
    """Rename the checkpoints after the step that a run resumes from, damaged or abandoned.

    Otherwise they would count as the newest ones, for resuming and for deleting old checkpoints.

    Returns:
        A message for each.
    """
    messages = []
    for number, folder in checkpoints(run):
        if number > step:
            aside = folder.with_name(f"set-aside-{number}")
            if aside.exists():
                shutil.rmtree(aside)
            os.replace(folder, aside)
            text = f"{folder.name} is kept as {aside.name}; delete it if you do not need it"
            messages.append(text)
    return messages


def remove_old_checkpoints(run: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, or 2 if that is more.

    The newest one must have been verified.
    """
    for _, folder in checkpoints(run)[max(keep, 2) :]:
        remove_folder(folder)


def remove_unfinished(run: Path) -> None:
    """Delete the files and folders that a killed run was writing."""
    for path in run.iterdir():
        if _UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _files(folder: Path) -> list[Path]:
    """Return the regular files in and below a folder, except the manifest; links are skipped."""
    return [
        Path(parent) / name
        for parent, _, names in os.walk(folder)
        for name in sorted(names)
        if (Path(parent), name) != (folder, MANIFEST) and not (Path(parent) / name).is_symlink()
    ]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if hasattr(os, "posix_fadvise"):  # read from the disk, not from the cache in memory
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
