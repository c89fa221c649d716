"""Command lines: a parser with short errors, and the exit statuses of a program.

Nothing heavy is imported here, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NoReturn

from .errors import PYTHON, Vocabulary, wording


class UsageError(Exception):
    """A mistake in the command that was found before anything is loaded."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors take one line that says what to do.

    Attributes:
        hint: what errors add about unknown options.
    """

    hint = ""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with status 2."""
        more = "" if "; " in message else f" (see `{self.prog} --help`)"
        print(f"{self.prog}: error: {message}{more}", file=sys.stderr)
        raise SystemExit(2)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the arguments; options may stand between positional arguments.

        For an unknown option the error names the most similar one.
        """
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


class Reporting:
    """A context in which errors are reported in one line on stderr and end with an exit status.

    Attributes:
        status: 0; 2 for a mistake in the command, found before anything is loaded; 1 for a later
            failure; 130 after Ctrl+C. It is set when the context is left.
        debug: whether to print the traceback of an error, too.
    """

    def __init__(self, prog: str, vocabulary: Vocabulary = PYTHON) -> None:
        """Name the program and the words in which its errors name fields."""
        self.prog = prog
        self.vocabulary = vocabulary
        self.status = 0
        self.debug = False

    def __enter__(self) -> Reporting:
        """Enter the context."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        """Report the error, if any, and set the status."""
        if error is None:
            try:
                sys.stdout.flush()
                return True
            except BrokenPipeError as broken:
                error = broken
        if isinstance(error, SystemExit):  # argparse: 0 after --help, 2 after a mistake
            self.status = error.code if isinstance(error.code, int) else 1
        elif isinstance(error, KeyboardInterrupt):
            print(f"{self.prog}: interrupted", file=sys.stderr)
            self.status = 130
        elif isinstance(error, BrokenPipeError):  # the reader, such as `head`, has finished
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            self.status = 1
        elif isinstance(error, Exception):
            if self.debug:
                traceback.print_exception(error)
            message = " ".join(wording(error, self.vocabulary).split()) or type(error).__name__
            print(f"{self.prog}: error: {message}", file=sys.stderr)
            self.status = 2 if isinstance(error, UsageError) else 1
        else:
            return False
        return True


def run(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    work: Callable[[argparse.Namespace], object],
    vocabulary: Vocabulary = PYTHON,
) -> int:
    """Parse the arguments, do the work and return the exit status, as `Reporting` describes it.

    Args:
        parser: has an option `--debug`.
        argv: the arguments, by default those of the process.
        work: does what the parsed arguments ask for.
        vocabulary: names fields in errors.
    """
    with Reporting(parser.prog, vocabulary) as report:
        args = parser.parse_args(argv)
        report.debug = args.debug
        work(args)
    return report.status
