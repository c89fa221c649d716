"""`localdit demo`: the web page of `localdit.demo`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

INSTALL = 'pip install "localdit[demo]"'


def main(argv: Sequence[str] | None = None) -> int:
    """Start the page; returns the exit status."""
    from .. import demo

    parser = demo.build_parser()
    parser.parse_args(argv)  # --help and mistakes come first
    if importlib.util.find_spec("gradio") is None:
        print(f"{parser.prog}: error: the page needs Gradio: {INSTALL}", file=sys.stderr)
        return 2
    return demo.main(argv)
