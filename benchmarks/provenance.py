"""Record the machine, versions, command, commit and date of a measurement."""

from __future__ import annotations

import datetime
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from localdit.machine import device_name, versions


def describe(device: str) -> dict[str, Any]:
    """Return the machine, the versions and the device that "auto" selects.

    Returns:
        "device", "machine" and "versions"; or "error" if the device does not exist.
    """
    import torch

    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        return {"error": "--device is cuda, but PyTorch finds none here; use --device cpu"}
    device = device if device != "auto" else "cuda" if available else "cpu"
    return {
        "device": device,
        "machine": device_name(torch.device(device)),
        "versions": versions(),
    }


def commit(root: Path) -> str | None:
    """Return the checked-out commit and whether files differ from it; None outside git."""
    try:
        name = _git(root, "rev-parse", "--short=10", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{name} with changes" if changed else name


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def circumstances(module: str, argv: Sequence[str], root: Path) -> dict[str, Any]:
    """Return the command, the date and the commit of a measurement."""
    return {
        "command": shlex.join(["python", "-m", module, *argv]),
        "date": datetime.date.today().isoformat(),
        "commit": commit(root),
    }


def sentence(about: Mapping[str, Any]) -> str:
    """Return the values of `describe` and `circumstances` as a line below a table."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    commit = f"commit {about['commit']}, " if about["commit"] else ""
    return f"`{about['command']}`; {about['machine']}; {versions}; {commit}{about['date']}."
