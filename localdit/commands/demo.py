"""`localdit demo`: the web page of `localdit.demo`."""

from ..demo import build_parser, main

__all__ = ["build_parser", "main"]
