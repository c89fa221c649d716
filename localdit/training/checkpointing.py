"""Checkpoints that can be relied on: written whole, proved by checksums, deleted last.

A checkpoint is a folder. It is written under another name, flushed to the disk, and renamed, so
that what has its name is complete. Its `manifest.json` holds the SHA-256 of each file, so that what
has rotted since is found out before it is used.
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

MANIFEST = "manifest.json"
FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d+)")
_UNFINISHED = re.compile(r"\..+\.tmp")
_CHUNK = 4 * 2**20  # bytes


class DamagedCheckpoint(ValueError):
    """A checkpoint that is not what was written."""


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to write into that appears at `path` once all of it is on the disk, or not at all.

    Raises:
        OSError: if something can't be written; then nothing is left of it.
    """
    unfinished = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        _flush(unfinished)
        with _put_aside(path):
            os.replace(unfinished, path)
        flush_entry(path.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def _put_aside(path: Path) -> Iterator[None]:
    """Take a folder out of the way under a name that no one looks at, then delete it."""
    aside = path.with_name(f".{path.name}.old.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    if path.exists():
        os.replace(path, aside)
    yield
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def new_checkpoint(run: Path, step: int) -> Iterator[Path]:
    """A folder to write a checkpoint into, which becomes `run/checkpoint-STEP`.

    Its manifest is added. Where the run holds one of this step already, that one is replaced.

    Raises:
        OSError: if something can't be written; then nothing is left of it.
        DamagedCheckpoint: if what was written reads back otherwise.
    """
    with whole_folder(run / f"checkpoint-{step}") as folder:
        yield folder
        sums = {str(file.relative_to(folder)): _sha256(file) for file in _files(folder)}
        manifest = {"format": FORMAT, "step": step, "sha256": sums}
        text = json.dumps(manifest, indent=2) + "\n"
        (folder / MANIFEST).write_text(text, encoding="utf-8")
        _flush(folder)
        verify_checkpoint(folder)


def verify_checkpoint(folder: Path) -> None:
    """Make sure that a checkpoint is what was written, byte by byte.

    Raises:
        DamagedCheckpoint: saying what is missing, added or altered.
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
            raise DamagedCheckpoint(f"{name} is not what was written: its SHA-256 differs")


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """Step and folder of each checkpoint of a run, the newest first; damaged ones included."""
    if not run.is_dir():
        return []
    named = ((_NAME.fullmatch(folder.name), folder) for folder in run.iterdir())
    found = [(int(match[1]), folder) for match, folder in named if match and folder.is_dir()]
    return sorted(found, reverse=True)


def step_of_checkpoint(folder: Path) -> int:
    """The step that a sound checkpoint is of, whatever its name."""
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["step"]


def newest_checkpoint(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and why each newer one was passed over."""
    passed_over = []
    for _, folder in checkpoints(run):
        try:
            verify_checkpoint(folder)
        except (DamagedCheckpoint, OSError) as error:
            passed_over.append(f"{folder.name} is passed over: {error}")
            continue
        return folder, passed_over
    return None, passed_over


def set_aside_after(run: Path, step: int) -> list[str]:
    """Rename the checkpoints after a step, as one goes on from it: they are damaged, or given up.

    So they are never taken for newer than what is written from then on, neither to go on from nor
    when old ones are deleted.

    Returns:
        What was done, a line for each.
    """
    told = []
    for number, folder in checkpoints(run):
        if number > step:
            aside = folder.with_name(f"set-aside-{number}")
            if aside.exists():
                shutil.rmtree(aside)
            os.replace(folder, aside)
            told.append(f"{folder.name} is kept as {aside.name}; delete it if you don't need it")
    return told


def remove_old_checkpoints(run: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what was left of unfinished ones.

    To be called once the newest one is known to be sound.
    """
    for _, folder in checkpoints(run)[max(keep, 2) :]:
        with _put_aside(folder):
            pass


def remove_unfinished(run: Path) -> None:
    """Delete the folders of checkpoints that were being written when the run was killed."""
    for folder in run.iterdir():
        if _UNFINISHED.fullmatch(folder.name) and folder.is_dir():
            shutil.rmtree(folder)


def _files(folder: Path) -> list[Path]:
    """The regular files in and below a folder, but the manifest; links are not followed."""
    return [
        Path(parent) / name
        for parent, _, names in os.walk(folder)
        for name in sorted(names)
        if (Path(parent), name) != (folder, MANIFEST) and not (Path(parent) / name).is_symlink()
    ]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if hasattr(os, "posix_fadvise"):  # read what the disk holds, not what memory remembers
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _flush(folder: Path) -> None:
    """Have the disk hold all files and entries of a folder."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            if not (Path(parent) / name).is_symlink():
                flush_entry(Path(parent) / name)
        flush_entry(Path(parent))


def flush_entry(path: Path) -> None:
    """Have the disk hold a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
