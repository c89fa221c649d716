"""Where a picture's time and memory go, and what each way to save them costs in quality.

    python -m benchmarks.pipeline parts      # text encoder, denoiser, autoencoder at full size
    python -m benchmarks.pipeline quality    # options beside the default, on the model in the box
    python -m benchmarks.pipeline compile    # compile time and run time, on the model in the box
    python -m benchmarks.pipeline seams      # decoding in tiles beside decoding at once
    python -m benchmarks.pipeline large      # 4096 x 4096 pixels from the model in the box

Writes `pipeline_NAME.json` and `pipeline_NAME.md` into the output folder. Full-size models have
random weights: their time and memory are those of trained ones, their pictures are not.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

NAMES = ("parts", "quality", "compile", "seams", "large")


def main() -> None:
    """Measure what is asked for, and write and print a table of it."""
    args = parse_args()
    measurement = importlib.import_module(f"benchmarks.pipeline_{args.name}")
    from benchmarks.pipeline_report import write_report

    print(write_report(args.name, measurement.measure(args), args))


def parse_args() -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("name", choices=NAMES, help="what to measure")
    add("--output", type=Path, default=Path("output/benchmarks"), help="folder to write")
    add("--threads", type=int, help="of PyTorch; by default as many as it chooses")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="parts: of all models")
    add("--pixels", type=int, help="side of the picture: parts 1024, seams 1536, large 4096")
    add(
        "--steps",
        type=int,
        help="denoising steps: large 4; parts measures 1, and takes it 20 times",
    )
    add("--tile", type=int, default=64, help="parts: side of a tile, in latents")
    add("--captions", type=int, default=100, help="quality: held-out captions to draw")
    add("--batch-size", type=int, default=10, help="quality, compile: captions per call")
    add("--repeats", type=int, default=3, help="compile: rounds of calls in turn")
    args = parser.parse_args()
    for name in ("threads", "pixels", "steps", "tile", "captions", "batch_size", "repeats"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}; expected at least 1")
    if args.pixels and args.pixels % 16:
        parser.error(f"--pixels is {args.pixels}; expected a multiple of 16")
    return args


if __name__ == "__main__":
    main()
