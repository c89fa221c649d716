"""Measuring in a process of its own, which starts with nothing loaded and may be killed.

    python -m benchmarks.worker MODULE:FUNCTION JSON

is what `in_own_process` starts: it prints what the function returns as its last line of JSON.
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
    """A process that ended without a result."""


def in_own_process(name: str, **arguments: Any) -> Any:
    """What a function of this package returns, called in a process of its own.

    Args:
        name: "module:function".
        **arguments: of the function, such as JSON can hold.

    Raises:
        WorkerError: if the process fails; what it printed is on stderr.
    """
    command = [sys.executable, "-m", "benchmarks.worker", name, json.dumps(arguments)]
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode < 0:
        raise WorkerError(f"killed by signal {-result.returncode}; out of memory, if by 9")
    if result.returncode:
        raise WorkerError(f"failed with status {result.returncode}")
    return json.loads(result.stdout.splitlines()[-1])


def encode(case: Case) -> dict[str, Any]:
    """A case as JSON can hold it."""
    return asdict(case)


def decode(values: Mapping[str, Any]) -> Case:
    """The case that `encode` was given."""
    return Case(**{**values, "contexts": tuple(values["contexts"])})


def times(case: dict[str, Any]) -> dict[str, Any]:
    """See `timing.measure_times`."""
    from .timing import measure_times

    return measure_times(decode(case))


def memory(
    case: dict[str, Any], denoiser: str, layers: int, attention: list[str]
) -> dict[str, Any]:
    """See `memory.measure_memory`; "error" where there is not enough."""
    import torch

    from localdit.machine import OUT_OF_MEMORY

    from .memory import measure_memory

    try:
        return dict(measure_memory(decode(case), DENOISERS[denoiser], layers, attention))
    except torch.OutOfMemoryError:
        return {"error": OUT_OF_MEMORY}


def main() -> None:
    """Call what the command line names and print what it returns."""
    module, _, name = sys.argv[1].partition(":")
    function = getattr(importlib.import_module(f"benchmarks.{module}"), name)
    from diffusers.utils import logging

    logging.set_verbosity_error()  # it advises about loading weights, and there are none
    print(json.dumps(function(**json.loads(sys.argv[2]))))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
