"""Options that the commands share."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from .cases import LOCALDIT, PIXELS_PER_TOKEN

OUTPUT = Path("output/benchmarks")


class Parser(argparse.ArgumentParser):
    """A parser that reports an error in one line."""

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with status 2."""
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise SystemExit(2)


def add_shared(parser: argparse.ArgumentParser, sides: list[int], repeats: int) -> None:
    """Add the options that several commands have."""
    add = parser.add_argument
    add("--pixels", metavar="N", type=pixels, nargs="+", default=sides,
        help=f"sides of the square images (default: {_listed(sides)})")  # fmt: skip
    add("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32"],
        help="precision; in training, bfloat16 is mixed precision (default: float32)")  # fmt: skip
    add("--context", nargs="+", choices=[*LOCALDIT], default=["local"],
        help="LocalDiT without or with global context; without it and for latents of 32 pixels: "
        "the preset released-f32; or with pooled keys (default: local)")  # fmt: skip
    add("--batch-size", metavar="N", type=positive, default=1, help="images at once (default: 1)")
    add(
        "--text-tokens",
        metavar="N",
        type=positive,
        default=120,
        help="text tokens per image (default: 120)",
    )
    add("--repeats", metavar="N", type=positive, default=repeats,
        help=f"timed runs of each model (default: {repeats})")  # fmt: skip
    add("--warm-up", metavar="N", type=_not_negative, default=2,
        help="warm-up runs of each model before them (default: 2)")  # fmt: skip
    add("--device", choices=["auto", "cpu", "cuda"], default="auto",
        help="device; auto takes cuda if there is one (default: auto)")  # fmt: skip
    add("--output", metavar="FOLDER", type=Path, default=OUTPUT,
        help=f"folder for the results (default: {OUTPUT})")  # fmt: skip


def positive(text: str) -> int:
    """Parse a whole number of at least 1."""
    number = _whole(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} given; expected at least 1")
    return number


def _not_negative(text: str) -> int:
    number = _whole(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} given; expected at least 0")
    return number


def pixels(text: str) -> int:
    """Parse the side of an image, a multiple of a token's side."""
    number = _whole(text)
    if number < PIXELS_PER_TOKEN or number % PIXELS_PER_TOKEN:
        raise argparse.ArgumentTypeError(f"{text} given; expected a multiple of {PIXELS_PER_TOKEN}")
    return number


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} given; expected a whole number") from None


def _listed(numbers: list[int]) -> str:
    return " ".join(map(str, numbers))


def prepare_output(parser: argparse.ArgumentParser, folder: Path, stem: str) -> Path:
    """Create the folder, and return the path of a new file in it, without a suffix.

    Exit with status 2 if the folder can't be created or written to.
    """
    from localdit.images import prepare_output_folder

    try:
        folder = prepare_output_folder(folder)
    except OSError as error:
        parser.error(str(error))
    number = 0
    while any(folder.glob(f"{stem}_{number:03}.*")):
        number += 1
    return folder / f"{stem}_{number:03}"
