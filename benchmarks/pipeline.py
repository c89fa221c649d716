"""Measure the time, memory and quality of image generation and its options.

    python -m benchmarks.pipeline whole      # from a prompt to a PNG file, full-size models
    python -m benchmarks.pipeline parts      # text encoder, denoiser, autoencoder at full size
    python -m benchmarks.pipeline quality    # options against the default, on the model in the box
    python -m benchmarks.pipeline compile    # compile time and run time, on the model in the box
    python -m benchmarks.pipeline seams      # decoding in tiles against decoding at once
    python -m benchmarks.pipeline large      # 4096 x 4096 pixels from the model in the box
    python -m benchmarks.pipeline sizes      # memory over images of 150 sizes, model in the box

Full-size models have random weights. They take the time and memory of trained models but do not
generate meaningful images.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from . import command_line, tables
from .provenance import circumstances, describe, sentence
from .worker import ROOT

NAMES = ("whole", "parts", "quality", "compile", "seams", "large", "sizes")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the measurement, print its table and save it.

    Returns:
        The exit status: 0; 2 for an error in the command; 130 if interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    args = parser.parse_args(argv)
    stem = command_line.prepare_output(parser, args.output, f"pipeline_{args.name}")
    about = describe("cpu") | circumstances("benchmarks.pipeline", argv, ROOT)
    measurement = importlib.import_module(f"benchmarks.pipeline_{args.name}")
    try:
        measured = measurement.measure(args)
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130
    page = table(measured) + f"\n{sentence(about)}\n"
    tables.save_as(stem, {"about": about, **measured}, page)
    print(f"{page}\nsaved as {stem}.json and .md")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = command_line.Parser(
        prog="benchmarks.pipeline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, positive = parser.add_argument, command_line.positive
    add("name", choices=NAMES, help="what to measure")
    add("--output", metavar="FOLDER", type=command_line.Path, default=command_line.OUTPUT,
        help=f"folder for the results (default: {command_line.OUTPUT})")  # fmt: skip
    add(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="whole, parts: dtype of all models (default: float32)",
    )
    add("--pixels", metavar="N", type=command_line.pixels,
        help="side of the image (default: whole, parts 1024, seams 1536, large 4096)")  # fmt: skip
    add(
        "--num-inference-steps",
        "--steps",
        metavar="N",
        type=positive,
        help="steps to run (default: large 4; parts 1, scaled to 20; whole 4 passes, scaled)",
    )
    add("--text-layers", metavar="N", type=positive, default=24,
        help="whole: layers of the text encoder to run, scaled to 24 (default: 24, which need "
        "18 GiB in float32)")  # fmt: skip
    add(
        "--tile",
        metavar="N",
        type=positive,
        default=64,
        help="parts: side of a tile in latents (default: 64)",
    )
    add("--captions", metavar="N", type=positive, default=100,
        help="quality: number of held-out captions (default: 100)")  # fmt: skip
    add("--batch-size", metavar="N", type=positive, default=10,
        help="quality, compile: captions per call (default: 10)")  # fmt: skip
    add("--repeats", metavar="N", type=positive, default=3,
        help="compile: rounds of calls in turn (default: 3)")  # fmt: skip
    return parser


def table(measured: dict[str, Any]) -> str:
    """Return the result of a measurement as Markdown.

    Args:
        measured: "columns", "rows" of cells and "notes"; other keys are ignored.
    """
    rows = [tables.line(map(str, cells)) for cells in measured["rows"]]
    return "\n".join([tables.head(measured["columns"]), *rows, "", *measured["notes"], ""])


if __name__ == "__main__":
    sys.exit(main())
