"""Time the parts of a LocalDiT block in inference.

    python -m benchmarks.breakdown --pixels 512 1024 --dtype float32 bfloat16

The parts are timed within whole forward passes of a model with random weights.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from . import command_line, tables
from .cases import LOCALDIT, Case
from .provenance import circumstances, describe, sentence
from .runs import make_model, make_run
from .worker import ROOT, encode

WINDOWS, TEXT, LINEARS = "window attention", "attention to the text", "linears"
ACTIVATION, REST = "feed-forward activation", "norms and the rest"
PARTS = (WINDOWS, LINEARS, TEXT, ACTIVATION, REST)
COLUMNS = ("pixels", "precision", "context", "ms per block", *(f"{part}, %" for part in PARTS))
LAYERS = 4  # one per shift


class Clock:
    """Sum the time of nested parts, each without the parts inside it.

    Only window attention includes the parts inside it.

    Attributes:
        seconds: seconds of each part since `reset`.
    """

    def __init__(self, synchronize: Callable[[], None] = lambda: None) -> None:
        self._synchronize = synchronize
        self._open: list[str] = []
        self._since = 0.0
        self.seconds = dict.fromkeys(PARTS, 0.0)

    def reset(self) -> None:
        """Reset all times to 0."""
        self.seconds = dict.fromkeys(PARTS, 0.0)

    def enter(self, part: str) -> None:
        """Start or continue a part."""
        self._turn()
        self._open.append(WINDOWS if WINDOWS in self._open else part)

    def leave(self) -> None:
        """End the part that started last."""
        self._turn()
        self._open.pop()

    @contextlib.contextmanager
    def part(self, part: str) -> Iterator[None]:
        """Time a part as a context."""
        self.enter(part)
        try:
            yield
        finally:
            self.leave()

    def _turn(self) -> None:
        self._synchronize()
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


def time_parts(block: Any, clock: Clock) -> None:
    """Make a `LocalDiTBlock` report its parts to a clock.

    Window attention is everything between the projection to queries, keys and values and the
    output projection: the call of the processor, including the linear layers of a global context.
    """
    from torch import nn

    def watch(module: nn.Module, part: str) -> None:
        module.register_forward_pre_hook(lambda *_: clock.enter(part))
        module.register_forward_hook(lambda *_: clock.leave())

    watch(block, REST)
    watch(block.attn2, TEXT)
    watch(block.ff.net[0], ACTIVATION)
    for module in block.modules():
        if isinstance(module, nn.Linear):
            watch(module, LINEARS)
    block.attn1.processor = timed(block.attn1.processor, clock, WINDOWS)
    block.attn2.processor = timed(block.attn2.processor, clock, TEXT)


def timed(processor: Any, clock: Clock, part: str) -> Any:
    """Return a copy of a processor that also reports its calls to the clock."""
    cls = type(processor)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with clock.part(part):
            return cls.__call__(self, *args, **kwargs)

    twin: Any = object.__new__(type(f"Timed{cls.__name__}", (cls,), {"__call__": call}))
    twin.__dict__.update(processor.__dict__)
    return twin


def measure(case: Case) -> dict[str, Any]:
    """Measure the seconds and the share of each part of a block.

    Returns:
        "seconds": for each counted pass, the seconds of each part per block. "block_seconds": the
        median of their sum. "percent": the median share of each part.
    """
    import torch

    denoiser = LOCALDIT[case.contexts[0]]
    model = make_model(denoiser, LAYERS, case)
    clock = Clock(torch.cuda.synchronize if case.device == "cuda" else lambda: None)
    for block in model.transformer_blocks:
        time_parts(block, clock)
    run = make_run(model, denoiser, case, [])
    passes = []
    for turn in range(case.warm_up + case.repeats):
        clock.reset()
        run()
        if turn >= case.warm_up:
            passes.append({part: time / LAYERS for part, time in clock.seconds.items()})
    blocks = [sum(parts.values()) for parts in passes]
    percent = {
        part: 100 * statistics.median(p[part] / b for p, b in zip(passes, blocks, strict=True))
        for part in PARTS
    }
    return {"seconds": passes, "block_seconds": statistics.median(blocks), "percent": percent}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = command_line.Parser(
        prog="benchmarks.breakdown", description="Time the parts of a LocalDiT block in inference."
    )
    command_line.add_shared(parser, sides=[1024], repeats=5)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every case, print and save.

    Returns:
        The exit status: 0; 2 for an error in the command; 130 if interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    args = parser.parse_args(argv)
    stem = command_line.prepare_output(parser, args.output, "breakdown")
    about = describe(args.device)
    if "error" in about:
        parser.error(about["error"])
    about |= circumstances("benchmarks.breakdown", argv, ROOT)
    try:
        measure_all(_cases(args, about["device"]), about, stem)
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; results so far: {stem}.*", file=sys.stderr)
        return 130
    return 0


def _cases(args: argparse.Namespace, device: str) -> list[Case]:
    return [
        Case(
            pixels=pixels,
            dtype=dtype,
            contexts=(context,),
            layers=LAYERS,
            batch_size=args.batch_size,
            text_tokens=args.text_tokens,
            device=device,
            repeats=args.repeats,
            warm_up=args.warm_up,
        )
        for dtype in args.dtype
        for context in args.context
        for pixels in args.pixels
    ]


def measure_all(cases: Sequence[Case], about: dict[str, Any], stem: Path) -> None:
    """Measure the cases one by one; print and save after each."""
    from diffusers.utils import logging

    logging.set_verbosity_error()  # its advice about loading weights does not apply
    records: list[dict[str, Any]] = []
    lines = [tables.head(COLUMNS)]
    print(lines[0], flush=True)
    for case in cases:
        record = {"case": encode(case), **measure(case)}
        records.append(record)
        shares = [f"{record['percent'][part]:.1f}" for part in PARTS]
        size = f"{case.pixels} x {case.pixels}"
        milliseconds = tables.seconds(1000 * record["block_seconds"])
        lines.append(tables.line([size, case.dtype, case.contexts[0], milliseconds, *shares]))
        print(lines[-1], flush=True)
        page = "\n".join([*lines, "", sentence(about), ""])
        tables.save_as(stem, {"about": about, "cases": records}, page)
    print(f"\n{sentence(about)}\n\nsaved as {stem}.json and .md")


if __name__ == "__main__":
    sys.exit(main())
