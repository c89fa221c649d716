"""Where, when and with what it was measured."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import platform
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "diffusers", "triton")


def describe(device: str) -> dict[str, Any]:
    """The machine and the versions, and the device that "auto" stands for.

    Returns:
        "device", "machine" and "versions"; or "error" where there is no such device.
    """
    import torch

    from localdit import __version__

    there = torch.cuda.is_available()
    if device == "cuda" and not there:
        return {"error": "--device is cuda, but PyTorch finds none here; use --device cpu"}
    device = device if device != "auto" else "cuda" if there else "cpu"
    if device == "cuda":
        machine = torch.cuda.get_device_name()
    else:
        machine = f"{torch.get_num_threads()} threads of {processor()}"
    versions = {"python": platform.python_version(), **package_versions()}
    return {"device": device, "machine": machine, "versions": versions | {"localdit": __version__}}


def package_versions() -> dict[str, str]:
    """The versions of the packages that matter, where they are installed."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def processor() -> str:
    """The processor's name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit(root: Path) -> str | None:
    """The commit that is checked out, and whether files differ from it; None outside of git."""
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
    """The command, the day and the commit of a measurement."""
    return {
        "command": shlex.join(["python", "-m", module, *argv]),
        "date": datetime.date.today().isoformat(),
        "commit": commit(root),
    }


def sentence(about: Mapping[str, Any]) -> str:
    """What `describe` and `circumstances` say, as a line below a table."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    commit = f"commit {about['commit']}, " if about["commit"] else ""
    return f"`{about['command']}`; {about['machine']}; {versions}; {commit}{about['date']}."
