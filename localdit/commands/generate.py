"""`localdit generate`: pictures from prompts."""

from __future__ import annotations

from collections.abc import Sequence

from . import options
from .drawing import run_drawing
from .parsing import Parser


def build_parser() -> Parser:
    """The arguments."""
    parser = Parser(
        prog="localdit generate",
        usage="%(prog)s PROMPT ... [options]",
        description="Make pictures from prompts. Every PNG carries the settings that made it.",
        epilog='example: localdit generate "a red circle on a blue background" -o circle.png',
    )
    options.add_prompts(parser)
    options.add_drawing(parser, size="the model's own size")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run_drawing(build_parser(), argv, "generate")
