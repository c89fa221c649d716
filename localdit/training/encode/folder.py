"""The folder that is encoded into: that it is of the same set, of one command, and has room."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save

from localdit.images import prepare_output_folder
from localdit.training.data.encoded import EMPTY_CAPTION, unwritten_shards
from localdit.training.data.manifest import MANIFEST, Manifest, read_manifest
from localdit.training.encode.shards import whole_file

UNFINISHED = ".*.tmp"
LOCK = ".lock"


def check_folder(folder: Path, manifest: Manifest) -> None:
    """Make sure that a folder may take the shards of a set.

    Raises:
        ValueError: if there is something else in it, or a set that was encoded otherwise.
    """
    if (folder / MANIFEST).is_file():
        if differences := read_manifest(folder).differences(manifest):
            raise ValueError(
                f"--output {folder} holds data that was encoded otherwise; now there is "
                f"{'; '.join(differences)}. Choose another folder, or the same settings."
            )
    elif folder.exists() and not folder.is_dir():
        raise ValueError(f"--output {folder} is no folder.")
    elif folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise ValueError(
            f"--output {folder} is not empty and holds no encoded data. Choose another, or remove "
            "what is in it."
        )


def free_bytes(folder: Path) -> int:
    """What can still be written to a folder, or where it would be; unfinished files don't count."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    unfinished = sum(path.stat().st_size for path in folder.glob(UNFINISHED))
    return shutil.disk_usage(existing).free + unfinished


def open_folder(folder: Path, manifest: Manifest, empty_text: torch.Tensor) -> list[int]:
    """Make a folder ready to take shards; the ones that are still to be written.

    Raises:
        OSError: if it can't be written to.
        ValueError: if another command is writing to it.
    """
    prepare_output_folder(folder)
    lock_folder(folder)
    for path in folder.glob(UNFINISHED):
        path.unlink()
    if not (folder / MANIFEST).is_file():
        with whole_file(folder / MANIFEST) as file:
            file.write((json.dumps(manifest.to_json(), indent=2) + "\n").encode())
    if not (folder / EMPTY_CAPTION).is_file():
        with whole_file(folder / EMPTY_CAPTION) as file:
            file.write(save({"text": empty_text}))
    return unwritten_shards(folder, manifest)


def lock_folder(folder: Path) -> None:
    """Keep the folder from other commands until this process ends, in whatever way."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    descriptor = os.open(
        folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666
    )  # stays open: closing unlocks
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(
            f"Another command is encoding into {folder}. To share the work among processes, start "
            "them together, by accelerate launch or torchrun."
        ) from None
    except OSError:  # some network file systems know no locks
        os.close(descriptor)
