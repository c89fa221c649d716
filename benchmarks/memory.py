"""The most memory that one model takes, in a process of its own."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from dataclasses import replace
from pathlib import Path

from .cases import Case, Denoiser, make_model, make_run, weight_bytes

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # to clear_refs: the peak is the present size (Linux, proc(5))


def measure_memory(
    case: Case, denoiser: Denoiser, layers: int, attention: list[str]
) -> dict[str, int]:
    """Bytes of a model's weights, and the most that its runs hold beside them.

    What is beside the weights are activations and, in training, gradients and AdamW's state too.
    Memory for making the model and for compiling it does not count, nor do libraries.
    """
    _load_libraries(case, denoiser, attention)
    model = make_model(denoiser, layers, case)
    run = make_run(model, case, attention)
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
        run()  # the first with all of AdamW's state in memory from the start
    return {"weights": weights, "beside": max(0, peak_bytes() - before)}


def _load_libraries(case: Case, denoiser: Denoiser, attention: list[str]) -> None:
    """Load what is loaded at a first run, so that it does not count as the model's."""
    tiny = replace(case, pixels=64, text_tokens=1, batch_size=1)
    make_run(make_model(denoiser, 1, tiny), tiny, attention)()
    if case.mode == "compiled":
        import torch

        torch.compiler.reset()  # else the model's shapes would count as changed ones


def resident_bytes() -> int:
    """The memory that this process holds."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """The most memory that this process held since `reset_peak`, or ever where that failed."""
    return _status("VmHWM")


def reset_peak() -> None:
    """Count the peak from now on, where the system can."""
    with contextlib.suppress(OSError):
        CLEAR.write_text(RESET_PEAK, encoding="ascii")


def _status(field: str) -> int:
    """A line of this process's status in bytes; elsewhere than on Linux the peak until now."""
    try:
        for line in STATUS.read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            if name == field:
                return int(value.split()[0]) * 1024
    except OSError:
        pass
    # Not this one on Linux: a child begins with its parent's.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def give_back_unused() -> None:
    """Have the allocator return what is free, where it can be asked to (glibc).

    Else what was freed before could be taken again without the process growing.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
