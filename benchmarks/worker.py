"""Run a measurement in a separate process, which starts with nothing loaded and may be killed.

    python -m benchmarks.worker MODULE:FUNCTION JSON

`in_own_process` starts this command. Its last line of output is the function's result as JSON.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .cases import DENOISERS, Case

ROOT = Path(__file__).resolve().parents[1]


class WorkerError(Exception):
    """A worker process ended without a result."""


def in_own_process(name: str, **arguments: Any) -> Any:
    """Call a function of this package in a separate process and return its result.

    Args:
        name: "module:function".
        **arguments: the function's arguments, as types that JSON supports.

    Raises:
        WorkerError: if the process fails; its own error message is on stderr.
    """
    command = [sys.executable, "-m", "benchmarks.worker", name, json.dumps(arguments)]
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode < 0:
        raise WorkerError(f"killed by signal {-result.returncode}; signal 9 means out of memory")
    if result.returncode:
        raise WorkerError(f"failed with status {result.returncode}")
    return json.loads(result.stdout.splitlines()[-1])


def encode(case: Case) -> dict[str, Any]:
    """Return a case as types that JSON supports."""
    return asdict(case)


def decode(values: Mapping[str, Any]) -> Case:
    """Return the case that `encode` was given."""
    return Case(**{**values, "contexts": tuple(values["contexts"])})


def times(case: dict[str, Any]) -> dict[str, Any]:
    """Call `timing.measure_times` with an encoded case."""
    from .timing import measure_times

    return measure_times(decode(case))


def memory(
    case: dict[str, Any], denoiser: str, layers: int, attention: list[str]
) -> dict[str, Any]:
    """Call `peak_memory.measure_memory`; return "error" if memory runs out."""
    import torch

    from localdit.machine import OUT_OF_MEMORY

    from .peak_memory import measure_memory

    try:
        return dict(measure_memory(decode(case), DENOISERS[denoiser], layers, attention))
    except torch.OutOfMemoryError:
        return {"error": OUT_OF_MEMORY}


def main() -> None:
    """Call the function that the command line names and print its result."""
    module, _, name = sys.argv[1].partition(":")
    function = getattr(importlib.import_module(f"benchmarks.{module}"), name)
    from diffusers.utils import logging

    logging.set_verbosity_error()  # its advice about loading weights does not apply
    print(json.dumps(function(**json.loads(sys.argv[2]))))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
