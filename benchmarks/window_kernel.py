"""Time window attention on a GPU: the Triton kernel and PyTorch's operations.

    python -m benchmarks.window_kernel --tokens 4096 16384 65536 --dtype bfloat16
    python -m benchmarks.window_kernel --sweep

The heads are those of the released model: 16 of 72 channels. The bound is the time in which the
device copies as many bytes as the kernel must read and write. Forward, it reads queries, keys and
values and writes the output. Backward, it reads those and a gradient and writes three gradients.
Calls run from a CUDA graph, so launch time does not count, and cycle through more inputs than fit
into the device's cache. The result is a Markdown table; `--sweep` prints one of launch settings.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import itertools
import math
import shlex
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from localdit.models import window_attention_triton as kernel
from localdit.models.backends import attend_within_windows, why_not_triton
from localdit.models.layers import RMSNorm
from localdit.models.windows import WindowGrid

HEADS, HEAD_DIM, WINDOW = 16, 72, 4
CHANNELS = HEADS * HEAD_DIM
BACKENDS: dict[str, Callable[..., torch.Tensor]] = {
    "Triton": kernel.window_attention,
    "PyTorch": functools.partial(attend_within_windows, "torch"),
}


def main() -> int:
    """Measure every case and print the table."""
    args = parse_args()
    if not torch.cuda.is_available():
        print("There is no CUDA device to measure on.", file=sys.stderr)
        return 1
    dtype = getattr(torch, args.dtype)
    qkv = torch.empty(1, WINDOW**2, 3 * CHANNELS, device="cuda", dtype=dtype)
    reason = why_not_triton(qkv, WindowGrid(WINDOW, WINDOW, WINDOW), HEADS)
    if reason is not None:
        print(f"The Triton kernel cannot be used: {reason}.", file=sys.stderr)
        return 1
    bandwidth = copy_bandwidth()
    print(describe(args, bandwidth))
    print()
    (sweep if args.sweep else compare)(args.tokens, dtype, bandwidth)
    return 0


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Time window attention on a GPU.")
    add = parser.add_argument
    add(
        "--tokens",
        type=int,
        nargs="+",
        default=[4096, 16384, 65536],
        help="numbers of tokens of square maps (default: 4096 16384 65536)",
    )
    add("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16",
        help="precision (default: bfloat16)")  # fmt: skip
    add("--sweep", action="store_true", help="compare launch settings of the kernel instead")
    args = parser.parse_args()
    if any(math.isqrt(tokens) ** 2 != tokens for tokens in args.tokens):
        parser.error("--tokens expects square numbers")
    return args


def compare(sizes: list[int], dtype: torch.dtype, bandwidth: float) -> None:
    """Print the time of each backend, and its ratio to the bound."""
    print("| tokens | pass | bound, µs | Triton, µs | : bound | PyTorch, µs | : bound |")
    print("|---|---|---|---|---|---|---|")
    for tokens, backward in itertools.product(sizes, (False, True)):
        bound = bound_of(tokens, dtype, bandwidth, backward)
        cells = [str(tokens), "forward and backward" if backward else "forward", micro(bound)]
        for attend in BACKENDS.values():
            time = time_of(attend, tokens, dtype, backward)
            cells += [micro(time), f"{time / bound:.2f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


def sweep(sizes: list[int], dtype: torch.dtype, bandwidth: float) -> None:
    """Print the kernel's time for several launch settings."""
    print("| tokens | pass | warps | stages | programs | µs | : bound |")
    print("|---|---|---|---|---|---|---|")
    settings = [(False, warps, 1, kernel.PROGRAMS) for warps in (1, 2, 4)]
    settings += itertools.product([True], (1, 2, 4, 8), (1, 2), (256, 512, 1024, 2048))
    for tokens, (backward, warps, stages, programs) in itertools.product(sizes, settings):
        with launched_with(warps, stages, programs, backward):
            time = time_of(kernel.window_attention, tokens, dtype, backward)
        cells: list[Any] = [tokens, "forward and backward" if backward else "forward", warps]
        cells += [stages, programs if backward else "", micro(time)]
        cells += [f"{time / bound_of(tokens, dtype, bandwidth, backward):.2f}"]
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


@contextlib.contextmanager
def launched_with(warps: int, stages: int, programs: int, backward: bool) -> Iterator[None]:
    """Launch one of the two passes with other settings; the other keeps its own."""
    own = kernel._launch

    def choice(slots: int, half: str, of_backward: bool) -> dict[str, int]:
        if of_backward != backward:
            return own(slots, half, of_backward)
        return {"num_warps": warps, "num_stages": stages}

    with (
        mock.patch.object(kernel, "_launch", choice),
        mock.patch.object(kernel, "PROGRAMS", programs),
    ):
        yield


def bound_of(tokens: int, dtype: torch.dtype, bandwidth: float, backward: bool) -> float:
    """Return the seconds in which the device copies all bytes to be read and written."""
    maps = 4 + 7 * backward  # maps of C channels read or written
    return maps * tokens * CHANNELS * dtype.itemsize / bandwidth


def time_of(
    attend: Callable[..., torch.Tensor], tokens: int, dtype: torch.dtype, backward: bool
) -> float:
    """Return the seconds of one call, including its backward pass if `backward`."""
    side = math.isqrt(tokens)
    grid = WindowGrid(side, side, WINDOW, 1, 1)
    norms = RMSNorm(HEAD_DIM, 1e-10).cuda(), RMSNorm(HEAD_DIM, 1e-10).cuda()
    bias = torch.randn((2 * WINDOW - 1) ** 2, HEADS, device="cuda").requires_grad_(backward)

    cache = torch.cuda.get_device_properties(0).L2_cache_size
    bytes_of_map = tokens * CHANNELS * dtype.itemsize
    turns = max(2, math.ceil(4 * cache / (3 * bytes_of_map)))
    maps = torch.randn(turns, 1, tokens, 3 * CHANNELS, device="cuda").to(dtype)
    grad = torch.randn(1, tokens, CHANNELS, device="cuda").to(dtype)

    def call(qkv: torch.Tensor) -> None:
        with torch.set_grad_enabled(backward):
            qkv = qkv.detach().requires_grad_(backward)
            out = attend(qkv, grid, HEADS, norms, True, bias)
            if backward:
                torch.autograd.grad(out, [qkv, norms[0].weight, norms[1].weight, bias], grad)

    def take_turns() -> None:
        for qkv in maps:
            call(qkv)

    return seconds(take_turns) / turns


def seconds(function: Callable[[], Any], repeats: int = 20) -> float:
    """Return the median seconds of the function, replayed from a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return sorted(times)[repeats // 2]


def copy_bandwidth() -> float:
    """Return the bytes per second that the device reads and writes when copying 1 GiB."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source))


def micro(time: float) -> str:
    """Format seconds as microseconds."""
    return f"{1e6 * time:.1f}"


def describe(args: argparse.Namespace, bandwidth: float) -> str:
    """Return a sentence with the setting, device, versions, date and command."""
    import triton

    command = shlex.join(["python", "-m", "benchmarks.window_kernel", *sys.argv[1:]])
    return (
        f"{HEADS} heads of {HEAD_DIM} channels, windows of {WINDOW} x {WINDOW}, {args.dtype}; "
        f"{torch.cuda.get_device_name()}, which copies {bandwidth / 1e12:.2f} TB/s; "
        f"torch {torch.__version__}, triton {triton.__version__}; {datetime.date.today()}; "
        f"`{command}`."
    )


if __name__ == "__main__":
    sys.exit(main())
