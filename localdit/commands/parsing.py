"""What all commands do alike: parsing, telling mistakes in one line, exit statuses."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn


class UsageError(Exception):
    """A mistake in the command, found before anything is loaded."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line that says what to do.

    Attributes:
        hint: what else to say of an unknown option.
    """

    hint = ""

    def error(self, message: str) -> NoReturn:
        """End with status 2."""
        more = "" if "; " in message else f" (`{self.prog} --help` explains)"
        print(f"{self.prog}: error: {message}{more}", file=sys.stderr)
        raise SystemExit(2)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, options among arguments too; an unknown one is told with its likeness."""
        parsed, unknown = self.parse_known_intermixed_args(args, namespace)
        for word in unknown:
            self.error(self._unknown(word))
        return parsed

    def _unknown(self, word: str) -> str:
        if not word.startswith("-"):
            return f"unexpected argument {word!r}: put quotes around text with spaces"
        option = word.split("=")[0]
        close = difflib.get_close_matches(option, self._option_string_actions, n=1)
        meant = f"; did you mean {close[0]}?" if close else ""
        return f"unknown option {option}{meant}{self.hint}"


def run(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    work: Callable[[argparse.Namespace], object],
    names: dict[str, str] | None = None,
) -> int:
    """Parse the arguments and do the work.

    Args:
        parser: has an option `--debug`.
        argv: the arguments, by default those of the process.
        work: does what the parsed arguments ask for; a `UsageError` is a mistake in them.
        names: what messages speak of, and what the user calls it.

    Returns:
        The exit status: 0; 2 for a mistake in the command, found before anything is loaded; 1 for
        a failure later; 130 when interrupted. Errors take one line on stderr, after a traceback
        with `--debug`.
    """
    args = parser.parse_args(argv)
    try:
        work(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        message = " ".join(str(error).split()) or type(error).__name__
        for name, called in (names or {}).items():
            message = message.replace(name, called)
        print(f"{parser.prog}: error: {message}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0
