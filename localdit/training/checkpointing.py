"""Reliable checkpoints: written whole, verified by checksums, and deleted last.

A checkpoint is a folder, complete as soon as it has its name (see `localdit.files`). Its
`manifest.json` holds the SHA-256 of each file and of its own entries, so later damage is detected
before it is used. The finished model of a run has a manifest, too.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import NamedTuple

from localdit.files import flush_folder, remove_folder, whole_folder

MANIFEST = "manifest.json"
FINAL = "final"  # the folder of the result of a run
FORMAT = 2
UNSEALED = 1  # the format of earlier versions, whose manifests hold no sum of their own entries
SEAL = "sha256_of_entries"
_NUMBERED = re.compile(r"(?:checkpoint|set-aside)-(\d+)(?:\.\d+)?")
_CHUNK = 4 * 2**20  # bytes


class DamagedCheckpoint(ValueError):
    """A checkpoint that differs from what was written."""


class Manifest(NamedTuple):
    """The step of a folder and the checksums of its files."""

    step: int  # optimizer steps before it was written
    # SHA-256 of each file, by its path within the folder. Links are not listed.
    sums: dict[str, str]

    def text(self) -> str:
        """Return the content of `manifest.json`, with the SHA-256 of its other entries."""
        entries = {"format": FORMAT, "step": self.step, "sha256": self.sums}
        seal = hashlib.sha256(json.dumps(entries).encode()).hexdigest()
        return json.dumps(entries | {SEAL: seal}, indent=2) + "\n"


@contextmanager
def verified_folder(path: Path, step: int) -> Iterator[Path]:
    """Make a folder that appears at `path` with a manifest, once it has been read back.

    An earlier folder of the same name is replaced.

    Raises:
        OSError: if something can't be written. Nothing of the folder is left then.
        DamagedCheckpoint: if the files read back differently. Nothing of the folder is left then.
    """
    with whole_folder(path) as folder:
        yield folder
        sums = {name: _sha256(folder / name) for name in files_in(folder)}
        (folder / MANIFEST).write_bytes(Manifest(step, sums).text().encode())
        flush_folder(folder)
        verify_checkpoint(folder)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a folder.

    A number in the folder's name must be the step. A manifest of an earlier version has no sum of
    its own entries, so its folder must have such a name.

    Raises:
        DamagedCheckpoint: if the manifest is missing or altered, or names another step.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise DamagedCheckpoint(f"it has no {MANIFEST}")
    content = path.read_bytes()
    try:
        entries = json.loads(content)
        version, sums = entries["format"], dict(entries["sha256"])
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        raise DamagedCheckpoint(f"its {MANIFEST} can't be read ({error!r})") from None
    if version not in (FORMAT, UNSEALED):
        raise DamagedCheckpoint(f"it has format {version}, this version reads {FORMAT}")
    manifest = Manifest(entries.get("step"), sums)
    sealed = version == FORMAT or SEAL in entries
    if sealed and content != manifest.text().encode():
        raise DamagedCheckpoint(f"{MANIFEST} is damaged: its SHA-256 differs from its entries")
    name = folder.resolve().name
    number = _NUMBERED.fullmatch(name)
    if number is None and not sealed:
        raise DamagedCheckpoint(
            f"an earlier version wrote its {MANIFEST}, which only the folder's name confirms: name "
            f"it checkpoint-{manifest.step}"
        )
    if number is not None and int(number[1]) != manifest.step:
        raise DamagedCheckpoint(
            f"its {MANIFEST} is of step {manifest.step}, but the folder is named {name}"
        )
    return manifest


def verify_checkpoint(folder: Path) -> Manifest:
    """Check every byte that the manifest of a folder names, and return the manifest.

    Files that it does not name are not read, here or on resuming.

    Raises:
        DamagedCheckpoint: if a file is missing or altered, or the manifest is; see `read_manifest`.
    """
    manifest = read_manifest(folder)
    if missing := manifest.sums.keys() - set(files_in(folder)):
        raise DamagedCheckpoint(f"it lacks {min(missing)}")
    for name, expected in manifest.sums.items():
        if _sha256(folder / name) != expected:
            raise DamagedCheckpoint(f"{name} is damaged: its SHA-256 differs from the manifest")
    return manifest


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """Return step and folder of each checkpoint, including damaged ones, the newest first."""
    return numbered(run, "checkpoint")


def numbered(run: Path, kind: str) -> list[tuple[int, Path]]:
    """Return step and folder of each `KIND-STEP` in the folder of a run, the newest first."""
    if not run.is_dir():
        return []
    name = re.compile(rf"{kind}-(\d+)")
    named = ((name.fullmatch(folder.name), folder) for folder in run.iterdir())
    found = [(int(match[1]), folder) for match, folder in named if match and folder.is_dir()]
    return sorted(found, reverse=True)


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
    A result after the step is renamed, too: it would seem to be of the resumed run.

    Returns:
        A message for each.
    """
    later = {f"set-aside-{number}": path for number, path in checkpoints(run) if number > step}
    with suppress(DamagedCheckpoint):
        if read_manifest(run / FINAL).step > step:
            later[f"set-aside-{FINAL}"] = run / FINAL
    return [_set_aside(folder, name) for name, folder in later.items()]


def _set_aside(folder: Path, name: str) -> str:
    """Rename a folder, with a number behind the name if it is taken, and return a message."""
    names = (name if number == 1 else f"{name}.{number}" for number in count(1))
    aside = next(path for path in map(folder.with_name, names) if not path.exists())
    os.replace(folder, aside)
    return f"{folder.name} is kept as {aside.name}; delete it if you do not need it"


def remove_old_checkpoints(run: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, or 2 if that is more.

    The newest one must have been verified.
    """
    for _, folder in checkpoints(run)[max(keep, 2) :]:
        remove_folder(folder)


def files_in(folder: Path) -> list[str]:
    """Return the paths of the regular files in and below a folder, except links and manifest."""
    files = (Path(parent) / name for parent, _, names in os.walk(folder) for name in names)
    names = (file.relative_to(folder).as_posix() for file in files if not file.is_symlink())
    return sorted(name for name in names if name != MANIFEST)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if hasattr(os, "posix_fadvise"):  # read from the disk, not from the cache in memory
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
