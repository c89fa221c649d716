"""`localdit inpaint`: parts of a picture repainted to follow a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from . import options
from .drawing import run_drawing
from .parsing import Parser


def build_parser() -> Parser:
    """The arguments."""
    parser = Parser(
        prog="localdit inpaint",
        usage="%(prog)s PICTURE MASK PROMPT ... [options]",
        description="Repaint the white parts of a mask in a picture to follow a prompt. The "
        "picture keeps its size, and where the mask is black, its pixels.",
        epilog='example: localdit inpaint street.png mask.png "a street with a red car"',
    )
    add = parser.add_argument
    add("image", metavar="PICTURE", type=Path, help="the picture to repaint")
    add("mask", metavar="MASK", type=Path, help="of its size: white is repainted, black is kept")
    options.add_prompts(parser)
    options.add_strength(parser, default=1.0)
    add("--padding-mask-crop", metavar="PIXELS", type=int,
        help="work on the mask's surroundings alone, so wide, in full detail (default: on the "
        "whole picture)")  # fmt: skip
    options.add_drawing(parser, size="the picture's proportions, as many pixels as the model's own")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run_drawing(build_parser(), argv, "inpaint")
