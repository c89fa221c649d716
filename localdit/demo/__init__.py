"""A page in the browser to play with: `localdit demo`, or `python -m localdit.demo`."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from ..commands import options
from ..commands.parsing import Parser, UsageError, run

INSTALL = 'pip install "localdit[demo]"'


def build_parser() -> Parser:
    """The arguments."""
    parser = Parser(
        prog="localdit demo",
        description="A page in the browser to draw, edit and inpaint pictures with. One picture is "
        "drawn at a time, others wait for their turn. Ctrl+C ends it.",
        epilog="example: localdit demo --output pictures",
    )
    add = parser.add_argument_group("page").add_argument
    add("--host", default="127.0.0.1", help="the address to listen at; 0.0.0.0 lets everyone in "
        "the network draw (default: 127.0.0.1, for this machine alone)")  # fmt: skip
    add("--port", metavar="N", type=int, help="(default: the first free one from 7860 on)")
    add("-o", "--output", metavar="FOLDER", type=Path,
        help="where to keep the pictures (default: they go when the page ends)")  # fmt: skip
    options.add_model(parser)
    options.add_debug(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Serve the page until Ctrl+C, which is its ordinary end; returns the exit status."""
    return run(build_parser(), argv, _serve, options.CALLED)


def _serve(args: argparse.Namespace) -> None:
    if importlib.util.find_spec("gradio") is None:
        raise UsageError(f"the page needs Gradio: {INSTALL}")
    from .opening import serve

    serve(args)
