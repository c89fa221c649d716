"""`localdit edit`: a picture changed to follow a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from . import options
from .drawing import run_drawing
from .parsing import Parser


def build_parser() -> Parser:
    """The arguments."""
    parser = Parser(
        prog="localdit edit",
        usage="%(prog)s PICTURE PROMPT ... [options]",
        description="Change a picture to follow a prompt. Every PNG carries the settings that made "
        "it.",
        epilog='example: localdit edit circle.png "a large green circle" --strength 0.7',
    )
    parser.add_argument("image", metavar="PICTURE", type=Path, help="the picture to start from")
    options.add_prompts(parser)
    options.add_strength(parser)
    options.add_drawing(parser, size="the picture's proportions, as many pixels as the model's own")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run_drawing(build_parser(), argv, "edit")
