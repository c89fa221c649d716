"""Command lines: a parser with short errors, the exit statuses of a program, and its output.

Nothing heavy is imported here, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NoReturn, TextIO

from .errors import PYTHON, Vocabulary, wording
from .files import is_unicode, require_folder_name

# Characters that could forge lines of output, control a terminal, or reverse the text direction.
CONTROLS = re.compile(r"[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


class UsageError(Exception):
    """A mistake in the command that was found before anything is loaded."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors take one line that says what to do. Options must be given in full.

    Attributes:
        hint: what errors add about unknown options.
    """

    hint = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take the arguments of `argparse.ArgumentParser`."""
        # "--prompt" is no short form of "--prompt-file".
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with status 2."""
        more = "" if "; " in message else f" (see `{self.prog} --help`)"
        say(f"{self.prog}: error: {one_line(message)}{more}", "stderr")
        raise SystemExit(2)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the arguments; options may stand between positional arguments.

        For an unknown option the error names the most similar one.
        """
        print_all_characters()
        parsed, unknown = self.parse_known_intermixed_args(args, namespace)
        for word in unknown:
            self.error(self._unknown(word))
        return parsed

    def _unknown(self, word: str) -> str:
        if not word.startswith("-"):
            return f"unexpected argument {word!r}: put quotes around text with spaces"
        option = word.split("=")[0]
        for action in self._get_positional_actions():
            if option == f"--{action.dest}":
                return (
                    f"unknown option {option}; write the {action.metavar or action.dest} without it"
                )
        close = difflib.get_close_matches(option, self._option_string_actions, n=1)
        meant = f"; did you mean {close[0]}?" if close else ""
        return f"unknown option {option}{meant}{self.hint}"


def text_argument(word: str) -> str:
    """Return an argument that is text: UTF-8, also where the locale has another encoding."""
    if is_unicode(word):
        return word
    try:
        return os.fsencode(word).decode()
    except UnicodeError:
        raise argparse.ArgumentTypeError(f"{word!a} is not UTF-8 text") from None


def path_argument(word: str) -> Path:
    """Return an argument that is a path, also where the shell leaves its `~`."""
    return Path(name_argument(word))


def name_argument(word: str) -> str:
    """Return an argument that is a path or another name, such as one of the hub."""
    if not word:  # of a variable that is not set; as a path, it would be the current folder
        raise argparse.ArgumentTypeError("it is empty; expected a path")
    return os.path.expanduser(word)


def folder_argument(word: str) -> Path:
    """Return an argument that is a folder to write to."""
    try:
        return require_folder_name(path_argument(word))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def output_argument(word: str) -> Path:
    """Return an argument that is a file to write, or a folder, as which it may end with a slash."""
    return folder_argument(word) if word.endswith(("/", os.sep)) else path_argument(word)


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
        print_all_characters()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        """Report the error, if any, and set the status."""
        failure = put("", sys.stdout)
        error = error or failure
        if error is None:
            return True
        if isinstance(error, SystemExit):  # argparse: 0 after --help, 2 after a mistake
            self.status = error.code if isinstance(error.code, int) else 1
        elif isinstance(error, KeyboardInterrupt):
            say(f"{self.prog}: interrupted", "stderr")
            self.status = 130
        elif isinstance(error, BrokenPipeError):  # the reader, such as `head`, has finished
            self.status = 1
        elif isinstance(error, Exception):
            if self.debug:
                traceback.print_exception(error)
            message = " ".join(wording(error, self.vocabulary).split()) or type(error).__name__
            say(f"{self.prog}: error: {one_line(message)}", "stderr")
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


# Output


def print_all_characters() -> None:
    r"""Let stdout and stderr print characters that their encoding lacks, as `\xe9` and so on."""
    for stream in (sys.stdout, sys.stderr):
        partial = getattr(stream, "errors", None) in ("strict", "surrogateescape")
        if partial and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def one_line(text: str) -> str:
    r"""Return a text with its line ends and control characters as `\n`, `\x1b` and so on."""
    return CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


def say(text: str, stream: Literal["stdout", "stderr"] = "stdout") -> None:
    """Print one or more lines at once. A failure to print does not end the work."""
    failure = put(f"{text}\n", getattr(sys, stream))
    if failure and stream != "stderr" and not isinstance(failure, BrokenPipeError):
        say(f"warning: {failure}", "stderr")


def put(text: str, stream: TextIO | None) -> OSError | None:
    """Write what a stream holds, and a text; if that fails, all further output vanishes.

    Args:
        stream: stdout or stderr; None if the process was started without it.

    Returns:
        What went wrong: a `BrokenPipeError` if the reader has finished, such as `head`.
    """
    if stream is None:
        return None
    try:
        stream.write(text)
        stream.flush()
        return None
    except (OSError, ValueError) as error:  # a ValueError, if the stream is closed
        with contextlib.suppress(OSError, ValueError):  # a stream that is no file
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if isinstance(error, BrokenPipeError):
            return error
        return OSError(f"can't print: {getattr(error, 'strerror', None) or error}")
