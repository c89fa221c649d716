"""This machine: processor, GPU and versions; time and memory; progress bars.

Nothing heavy is imported with this module.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.metadata
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    import torch

PACKAGES = ("torch", "diffusers", "triton")
OUT_OF_MEMORY = "out of memory"
SMALL = 0.02  # bound of random weights


# Names and versions


def versions() -> dict[str, str]:
    """Return the versions of Python, LocalDiT and the installed ones of `PACKAGES`."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found | {"localdit": __version__}


def processor() -> str:
    """Return the name of the processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the processor with the number of PyTorch's threads."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"GPU of {processor()}"
    threads = torch.get_num_threads()
    return f"{threads} thread{'s' if threads > 1 else ''} of {processor()}"


# Memory


def give_memory_back() -> None:
    """Return freed memory to the system: PyTorch's caches, and what malloc keeps."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
    if sys.platform == "linux":
        # glibc keeps freed memory for later; other C libraries lack this function.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


# Progress bars


def hide_loading_bars() -> None:
    """Let Diffusers and Transformers show progress bars of loading on terminals only."""
    if sys.stderr.isatty():
        return
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def hidden(hide: bool = False) -> bool | None:
    """Return tqdm's `disable`: True to hide the bar, None to show it on terminals only."""
    return True if hide else None


# Time


def with_random_weights(
    make: Callable[[], Any], dtype: torch.dtype, device: str | torch.device
) -> Any:
    """Return a model with small random weights; its own initialisation, which is slow, is skipped.

    Args:
        make: constructs the model.
        dtype: of the weights.
        device: where the weights are.
    """
    import torch

    with torch.device("meta"):
        model = make()
    # `Module.to`: that of Diffusers' models warns of a cast after loading, and nothing was loaded.
    model = torch.nn.Module.to(model, dtype).to_empty(device=device)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            assert tensor.is_floating_point(), "only floating-point tensors can be random"
            tensor.uniform_(-SMALL, SMALL)
    return model


def take_turns(
    runs: Sequence[tuple[Callable[[], None], dict[str, Any]]], warm_up: int, repeats: int
) -> None:
    """Call each function in turn, several times, and note the seconds of each call in its record.

    A function that runs out of the device's memory is left out from then on, and its record says
    so.

    Args:
        runs: functions, each with its record. `record["first_call"]` gets the seconds of the first
            call, the list `record["seconds"]` those of the calls after the warm-up.
        warm_up: turns that are not counted.
        repeats: turns that are counted.
    """
    import torch

    for turn in range(warm_up + repeats):
        for run, record in runs:
            if "error" in record:
                continue
            start = time.perf_counter()
            try:
                run()
            except torch.OutOfMemoryError:
                record["error"] = OUT_OF_MEMORY
                record["seconds"] = []
                torch.cuda.empty_cache()
                continue
            seconds = time.perf_counter() - start
            if turn == 0:
                record["first_call"] = seconds
            if turn >= warm_up:
                record["seconds"].append(seconds)


@dataclass(frozen=True)
class Spread:
    """The median, the lowest and the highest of some values."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of `values`."""
        return cls(statistics.median(values), min(values), max(values))

    def as_dict(self) -> dict[str, float]:
        """Return the three as a dict, for JSON."""
        return asdict(self)
