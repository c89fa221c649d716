"""Metrics of a run: means over steps, shares of time, and use of the device."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

PARTS = ("data", "encoding", "compute")

# Dense peaks in 10**12 operations per second: float16 and bfloat16 with float32 sums, then float32
# outside the tensor cores. From NVIDIA's data sheets of A100, H100, H200 and L40S (half of the
# figures "with sparsity") and its white papers on the architectures GA102, Ada and
# RTX Blackwell. The keys are those of `torch.cuda.get_device_name`.
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
    """Return the peak of a device in dense operations per second, or None if it is unknown.

    It is unknown in float32 if matrix products may be computed in TensorFloat32.
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
    """Adds up the time spent in the parts of a step.

    On CUDA it measures the time of the device, which works through a queue, far behind the
    processor. An event at each end of a part marks its place in the queue. So while the processor
    fetches data, only the time in which the device is idle counts.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Count the time inside as `part`. Parts don't nest."""
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
        """Return the seconds of each part since the last call. On CUDA, wait for the last part."""
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

    The means depend only on the steps, not on interruptions of a run, because `state_dict` holds
    the sums. Times count from the last line or the start of the program.

    Attributes:
        watch: measures the parts "data", "encoding" and "compute".
    """

    def __init__(
        self, device: torch.device, num_devices: int = 1, peak: float | None = None
    ) -> None:
        """Start with no steps.

        Args:
            num_devices: number of devices of the run, which share the operations.
            peak: the peak of one device in operations per second, from `peak_flops`.
        """
        self.watch = Stopwatch(device)
        self._num_devices, self._peak = num_devices, peak
        self._steps = self._skipped = 0
        self._sums = {"loss": 0.0, "grad_norm": 0.0}
        self._learning_rate = 0.0
        self._images = self._flops = 0
        self._since = time.perf_counter()

    def add(
        self, loss: float, grad_norm: float, learning_rate: float, images: int, flops: int = 0
    ) -> None:
        """Count an optimizer step.

        Args:
            loss, grad_norm: values of the whole batch, over all processes.
            images: number of pictures in the whole batch.
            flops: operations of the model for all of them, forward and backward.
        """
        self._steps += 1
        self._sums["loss"] += loss
        self._sums["grad_norm"] += grad_norm
        self._learning_rate = learning_rate
        self._images += images
        self._flops += flops

    def skip(self) -> None:
        """Count a step that was skipped because its loss or gradient was not finite."""
        self._skipped += 1

    def line(self, step: int) -> dict[str, float]:
        """Return the line to log after a step, and start the next one.

        `loss` and `grad_norm` are means over the steps, `learning_rate` is the last step's; all
        three are absent if no step was taken. `skipped_steps` is present if one was.
        `images_per_second` covers all time, including saving and validation;
        `data_share`, `encoding_share` and `compute_share` are shares of that time in [0, 1];
        `tflops` are 10**12 operations of the model per second on each device, and `mfu` is their
        share of the device's peak, if that is known.
        """
        line: dict[str, float] = {"step": step}
        if self._steps:
            line |= {name: total / self._steps for name, total in self._sums.items()}
            line["learning_rate"] = self._learning_rate
        if self._skipped:
            line["skipped_steps"] = self._skipped
        line |= self._pace()
        self._steps = self._skipped = 0
        self._sums = dict.fromkeys(self._sums, 0.0)
        return line

    def _pace(self) -> dict[str, float]:
        """Return the numbers that depend on time."""
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
        """Return the sums for the next line, ready for JSON."""
        state = {
            "steps": self._steps,
            "sums": dict(self._sums),
            "learning_rate": self._learning_rate,
        }
        return state | ({"skipped": self._skipped} if self._skipped else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the sums of an earlier run; times count from now."""
        self._steps, self._skipped = state["steps"], state.get("skipped", 0)
        self._sums = dict(state["sums"])
        self._learning_rate = state["learning_rate"]
        self.watch.collect()
        self._images = self._flops = 0
        self._since = time.perf_counter()
