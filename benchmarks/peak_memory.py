"""Measure the peak memory of one model, in a separate process."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from dataclasses import replace
from pathlib import Path

from .cases import Case, Denoiser
from .runs import make_model, make_run, weight_bytes

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # written to clear_refs, resets the peak to the present size (Linux, proc(5))


def measure_memory(
    case: Case, denoiser: Denoiser, layers: int, attention: list[str]
) -> dict[str, int]:
    """Return the bytes of a model's weights, and the peak bytes beside them.

    Beside the weights are activations and, in training, gradients and AdamW's state.
    Memory for creating and compiling the model, and for libraries, does not count.
    """
    _load_libraries(case, denoiser, attention)
    model = make_model(denoiser, layers, case)
    run = make_run(model, denoiser, case, attention)
    weights = weight_bytes(model)
    if case.device == "cuda":
        import torch

        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.reset_peak_memory_stats()
        run()
        return {"weights": weights, "beside": torch.cuda.max_memory_allocated() - before}
    give_back_unused()
    before = resident_bytes()
    if case.mode == "compiled":
        run()
        give_back_unused()
    reset_peak()
    run()
    if case.task == "training":
        run()  # the first step that starts with all of AdamW's state in memory
    return {"weights": weights, "beside": max(0, peak_bytes() - before)}


def _load_libraries(case: Case, denoiser: Denoiser, attention: list[str]) -> None:
    """Load what a first run loads, so that it does not count as the model's memory."""
    tiny = replace(case, pixels=64, text_tokens=1, batch_size=1)
    make_run(make_model(denoiser, 1, tiny), denoiser, tiny, attention)()
    if case.mode == "compiled":
        import torch

        torch.compiler.reset()  # or the model's shapes would count as changed


def resident_bytes() -> int:
    """Return the memory that this process holds."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """Return this process's peak memory since `reset_peak`, or since its start if that failed."""
    return _status("VmHWM")


def reset_peak() -> None:
    """Reset the peak to the present size, if the system supports it."""
    with contextlib.suppress(OSError):
        CLEAR.write_text(RESET_PEAK, encoding="ascii")


def _status(field: str) -> int:
    """Return a field of this process's status in bytes; outside Linux, the peak so far."""
    try:
        for line in STATUS.read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            if name == field:
                return int(value.split()[0]) * 1024
    except OSError:
        pass
    # Not used on Linux: a child process starts with its parent's value.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def give_back_unused() -> None:
    """Make the allocator return free memory to the system, if it can (glibc).

    Otherwise freed memory could be reused without the process growing.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
