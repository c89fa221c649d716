"""The options that the commands share."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from .cases import LOCALDIT, PIXELS_PER_TOKEN

OUTPUT = Path("output/benchmarks")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """End with status 2."""
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise SystemExit(2)


def add_shared(parser: argparse.ArgumentParser, sides: list[int], repeats: int) -> None:
    """Add the options that every command has."""
    add = parser.add_argument
    add("--pixels", metavar="N", type=pixels, nargs="+", default=sides,
        help=f"sides of the square pictures (default: {_listed(sides)})")  # fmt: skip
    add("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32"],
        help="in inference of all; in training bfloat16 is mixed (default: float32)")  # fmt: skip
    add("--context", nargs="+", choices=[*LOCALDIT], default=["local"],
        help="LocalDiT without and with global context (default: local)")  # fmt: skip
    add("--batch-size", metavar="N", type=positive, default=1, help="default: 1")
    add("--text-tokens", metavar="N", type=positive, default=120, help="default: 120")
    add("--repeats", metavar="N", type=positive, default=repeats,
        help=f"runs of each that count (default: {repeats})")  # fmt: skip
    add("--warm-up", metavar="N", type=_not_negative, default=2,
        help="runs of each before those that count (default: 2)")  # fmt: skip
    add("--device", choices=["auto", "cpu", "cuda"], default="auto",
        help="default: auto, cuda where there is one")  # fmt: skip
    add("--output", metavar="FOLDER", type=Path, default=OUTPUT, help=f"default: {OUTPUT}")


def positive(text: str) -> int:
    """A whole number of at least 1."""
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
    """The side of a picture that is made of whole tokens."""
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
    """Create the folder, and name a file in it that is not there yet, without its suffix.

    A folder that can't be created or written to is a mistake in the command.
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
