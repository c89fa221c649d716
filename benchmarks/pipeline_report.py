"""Tables, and what has to be known to measure the same again."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any


def write_report(name: str, measured: dict[str, Any], args: Namespace) -> str:
    """Write JSON and Markdown into `args.output`; return the Markdown.

    Args:
        measured: "columns", "rows" of cells, "notes", and whatever else is worth keeping.
    """
    about = conditions(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    report = json.dumps({"conditions": about, **measured}, indent=1)
    (args.output / f"pipeline_{name}.json").write_text(report + "\n", "utf-8")
    columns = measured["columns"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [f"| {' | '.join(map(str, row))} |" for row in measured["rows"]]
    lines += ["", *measured["notes"], ", ".join(about[key] for key in about) + "."]
    text = "\n".join(lines) + "\n"
    (args.output / f"pipeline_{name}.md").write_text(text, "utf-8")
    return text


def conditions(threads: int | None) -> dict[str, str]:
    """The machine, versions, date and command."""
    packages = ("torch", "diffusers", "transformers")
    command = ["python", "-m", "benchmarks.pipeline", *sys.argv[1:]]
    return {
        "machine": f"{os.cpu_count()}-core {processor()}",
        "threads": "default threads" if threads is None else f"{threads} thread(s)",
        "versions": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages),
        "date": str(datetime.date.today()),
        "command": f"`{shlex.join(command)}`",
    }


def processor() -> str:
    """The processor's name, such as "AMD EPYC CPU"."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip().removesuffix(" Processor") + " CPU"
    return platform.processor() or platform.machine()


def in_own_process(function: str, threads: int | None = None, **arguments: Any) -> dict[str, Any]:
    """Call `module:name` of this package in a process of its own, for the sake of its memory.

    Returns:
        What the function returned, and "peak_bytes", the most memory the process ever held.
    """
    module, name = function.split(":")
    script = (
        f"import json, torch\nfrom benchmarks.{module} import {name}\n"
        "from benchmarks.pipeline_report import peak_bytes\n"
        f"if {threads!r}: torch.set_num_threads({threads!r})\n"
        f"result = {name}(**{arguments!r})\n"
        "print(json.dumps(result | {'peak_bytes': peak_bytes()}))"
    )
    command = [sys.executable, "-c", script]
    root = Path(__file__).parents[1]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=root)
    return json.loads(result.stdout.splitlines()[-1])


def peak_bytes() -> int:
    """The most memory that this process ever held, where Linux tells; else what POSIX tells."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_bytes() -> int:
    """The memory that this process holds now. Linux only."""
    return 1024 * int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0])


def gib(size: float) -> str:
    """Bytes in GiB."""
    return f"{size / 2**30:.2f}"
