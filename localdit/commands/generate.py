"""`localdit generate`: pictures from prompts."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from . import options
from .drawing import draw
from .job import plan
from .parsing import Parser, run


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
    options.add_output(parser)
    options.add_model(parser)
    options.add_debug(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""

    def work(args: argparse.Namespace) -> None:
        draw(plan(args, "generate"))

    return run(build_parser(), argv, work, options.CALLED)
