"""Where a picture's time and memory go, and what each way to save them costs in quality.

    python -m benchmarks.pipeline parts      # text encoder, denoiser, autoencoder at full size
    python -m benchmarks.pipeline quality    # options beside the default, on the model in the box
    python -m benchmarks.pipeline compile    # compile time and run time, on the model in the box
    python -m benchmarks.pipeline seams      # decoding in tiles beside decoding at once
    python -m benchmarks.pipeline large      # 4096 x 4096 pixels from the model in the box

Full-size models have random weights: their time and memory are those of trained ones, their
pictures are not.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from . import options, report
from .machine import circumstances, describe, sentence
from .worker import ROOT

NAMES = ("parts", "quality", "compile", "seams", "large")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is asked for, print a table of it and save it.

    Returns:
        The exit status: 0; 2 for a mistake in the command; 130 when interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    args = parser.parse_args(argv)
    stem = options.prepare_output(parser, args.output, f"pipeline_{args.name}")
    about = describe("cpu") | circumstances("benchmarks.pipeline", argv, ROOT)
    measurement = importlib.import_module(f"benchmarks.pipeline_{args.name}")
    try:
        measured = measurement.measure(args)
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130
    page = table(measured) + f"\n{sentence(about)}\n"
    report.save_as(stem, {"about": about, **measured}, page)
    print(f"{page}\nsaved as {stem}.json and .md")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = options.Parser(
        prog="benchmarks.pipeline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, positive = parser.add_argument, options.positive
    add("name", choices=NAMES, help="what to measure")
    add("--output", metavar="FOLDER", type=options.Path, default=options.OUTPUT,
        help=f"default: {options.OUTPUT}")  # fmt: skip
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="parts: of all models")
    add("--pixels", metavar="N", type=options.pixels,
        help="side of the picture: parts 1024, seams 1536, large 4096")  # fmt: skip
    add("--steps", metavar="N", type=positive,
        help="denoising steps: large 4; parts measures 1, and takes it 20 times")  # fmt: skip
    add("--tile", metavar="N", type=positive, default=64, help="parts: side of a tile, in latents")
    add("--captions", metavar="N", type=positive, default=100,
        help="quality: held-out captions to draw")  # fmt: skip
    add("--batch-size", metavar="N", type=positive, default=10,
        help="quality, compile: captions per call")  # fmt: skip
    add("--repeats", metavar="N", type=positive, default=3,
        help="compile: rounds of calls in turn")  # fmt: skip
    return parser


def table(measured: dict[str, Any]) -> str:
    """What a measurement found, as Markdown.

    Args:
        measured: "columns", "rows" of cells, "notes", and whatever else is worth keeping.
    """
    rows = [report.line(map(str, cells)) for cells in measured["rows"]]
    return "\n".join([report.head(measured["columns"]), *rows, "", *measured["notes"], ""])


if __name__ == "__main__":
    sys.exit(main())
