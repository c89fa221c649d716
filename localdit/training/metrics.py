"""What a run logs: means over steps, where their time went, how well the device was used."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

PARTS = ("data", "encoding", "compute")

# Dense peaks in 10**12 operations a second: float16 and bfloat16 with float32 sums, then float32
# outside of the tensor cores. From NVIDIA's data sheets of A100, H100, H200 and L40S (half of the
# figures that are given "with sparsity") and its white papers on the architectures GA102, Ada and
# RTX Blackwell. Keyed by what `torch.cuda.get_device_name` says.
PEAK_TFLOPS = {
    "NVIDIA A100-SXM4-40GB": (312.0, 19.5),
    "NVIDIA A100-SXM4-80GB": (312.0, 19.5),
    "NVIDIA A100-PCIE-40GB": (312.0, 19.5),
    "NVIDIA A100 80GB PCIe": (312.0, 19.5),
    "NVIDIA H100 80GB HBM3": (989.5, 67.0),
    "NVIDIA H100 PCIe": (756.5, 51.0),
    "NVIDIA H200": (989.5, 67.0),
    "NVIDIA L40S": (362.0, 91.6),
    "NVIDIA GeForce RTX 3090": (71.0, 35.6),
    "NVIDIA GeForce RTX 4090": (165.2, 82.6),
    "NVIDIA GeForce RTX 5090": (209.5, 104.8),
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The most operations a second that a device can do, dense; None where it isn't known.

    In float32 it isn't where matrix products may be taken in TensorFloat32.
    """
    if device.type != "cuda":
        return None
    peaks = PEAK_TFLOPS.get(torch.cuda.get_device_name(device))
    if peaks is None:
        return None
    if dtype in (torch.float16, torch.bfloat16):
        return peaks[0] * 1e12
    plain = dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return peaks[1] * 1e12 if plain else None


class Stopwatch:
    """Adds up the time that passes in the parts of a step: by the clock, but on CUDA.

    There it is the device's own: it works through a queue, and the processor is far ahead of it. An
    event at each end of a part marks the place in the queue. So a part in which the processor
    fetches data counts as long as the device stood idle for it, and no longer.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Count what happens inside as `part`; parts don't nest."""
        if self._on_cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((part, start, end))
        else:
            since = time.perf_counter()
            yield
            self._seconds[part] += time.perf_counter() - since

    def collect(self) -> dict[str, float]:
        """The seconds of each part since the last call; on CUDA waits for the last to end."""
        if self._events:
            self._events[-1][2].synchronize()
            for part, start, end in self._events:
                self._seconds[part] += start.elapsed_time(end) / 1000
            self._events.clear()
        seconds = dict(self._seconds)
        self._seconds.clear()
        return seconds


class Metrics:
    """Means over the steps since the last line, and the pace.

    What a line says of the training itself depends on the steps alone, and not on when a run was
    interrupted: `state_dict` holds the sums. What it says of time counts from the last line or the
    start of the program.

    Attributes:
        watch: counts the time of the parts "data", "encoding" and "compute".
    """

    def __init__(
        self, device: torch.device, num_devices: int = 1, peak: float | None = None
    ) -> None:
        """Start with no steps.

        Args:
            device: that of this process.
            num_devices: of the whole run, which share the operations.
            peak: the most operations a second that one of them can do, as of `peak_flops`.
        """
        self.watch = Stopwatch(device)
        self._num_devices, self._peak = num_devices, peak
        self._steps = 0
        self._sums = {"loss": 0.0, "grad_norm": 0.0}
        self._learning_rate = 0.0
        self._images = self._flops = 0
        self._since = time.perf_counter()

    def add(
        self, loss: float, grad_norm: float, learning_rate: float, images: int, flops: int = 0
    ) -> None:
        """Count one optimizer step.

        Args:
            loss, grad_norm: of the whole batch, over all processes.
            learning_rate: it was taken with.
            images: in the whole batch.
            flops: operations of the model for all of them, forward and backward.
        """
        self._steps += 1
        self._sums["loss"] += loss
        self._sums["grad_norm"] += grad_norm
        self._learning_rate = learning_rate
        self._images += images
        self._flops += flops

    def line(self, step: int) -> dict[str, float]:
        """The line to log after a step; the next one starts anew.

        `loss` and `grad_norm` are means over the steps, `learning_rate` is that of the last;
        `images_per_second` counts the time of everything, saving and validation too;
        `data_share`, `encoding_share` and `compute_share` are shares of that time in [0, 1];
        `tflops` are 10**12 operations of the model a second on each device, and `mfu` is their
        share of what it can do, where that is known.
        """
        line: dict[str, float] = {"step": step}
        line |= {name: total / max(1, self._steps) for name, total in self._sums.items()}
        line["learning_rate"] = self._learning_rate
        line |= self._pace()
        self._steps = 0
        self._sums = dict.fromkeys(self._sums, 0.0)
        return line

    def _pace(self) -> dict[str, float]:
        """What depends on time."""
        parts = self.watch.collect()  # first, since it waits for the device
        now = time.perf_counter()
        seconds = now - self._since
        pace = {"images_per_second": self._images / seconds}
        pace |= {f"{part}_share": parts.get(part, 0.0) / seconds for part in PARTS}
        if self._flops:
            pace["tflops"] = self._flops / seconds / self._num_devices / 1e12
            if self._peak is not None:
                pace["mfu"] = pace["tflops"] * 1e12 / self._peak
        self._since = now
        self._images = self._flops = 0
        return pace

    def state_dict(self) -> dict[str, Any]:
        """What the next line needs to know of the steps so far, as JSON can hold it."""
        return {
            "steps": self._steps,
            "sums": dict(self._sums),
            "learning_rate": self._learning_rate,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the sums of an earlier run, and with a clock of one's own."""
        self._steps = state["steps"]
        self._sums = dict(state["sums"])
        self._learning_rate = state["learning_rate"]
        self.watch.collect()
        self._images = self._flops = 0
        self._since = time.perf_counter()
