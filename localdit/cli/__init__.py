"""The command line: `localdit COMMAND ...`.

The module of a command is imported when the command is run. Its parser sets `run`, the function
that takes the parsed arguments.
"""

from __future__ import annotations

import difflib
import importlib
import shlex
import sys
from collections.abc import Sequence
from typing import NamedTuple

from ..parsing import Reporting, UsageError
from ..version import __version__
from .arguments import COMMAND_LINE

PROGRAM = "localdit"


class Command(NamedTuple):
    """A command."""

    help: str  # what it does
    module: str  # the module that is imported to run it
    # The function in the module that makes its parser; None for a command that parses its own
    # arguments, in the function that has its name
    parser: str | None = "build_parser"


COMMANDS = {
    "generate": Command("generate pictures from prompts", "drawing", "generate_parser"),
    "edit": Command("change a picture to follow a prompt", "drawing", "edit_parser"),
    "inpaint": Command(
        "repaint the white parts of a mask in a picture", "drawing", "inpaint_parser"
    ),
    "info": Command("describe a checkpoint, a folder or a PNG, and this machine", "info"),
    "convert": Command("convert a checkpoint file to a Diffusers folder, or back", "convert"),
    "train": Command("train on captioned pictures, with Accelerate", "train", None),
    "evaluate": Command("generate and score the pictures of a benchmark", "evaluate"),
    "bench": Command("time window attention on this machine", "bench"),
    "demo": Command("serve a web page for generating pictures", "demo"),
}
# Names of these commands in other programs.
ALSO_CALLED = {
    "txt2img": "generate",
    "text2img": "generate",
    "t2i": "generate",
    "img2img": "edit",
    "i2i": "edit",
    "fill": "inpaint",
    "inspect": "info",
    "export": "convert",
    "finetune": "train",
    "benchmark": "bench",
    "eval": "evaluate",
    "score": "evaluate",
    "serve": "demo",
    "gradio": "demo",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name; without arguments, print the help.

    Args:
        argv: the arguments, by default those of the process.

    Returns:
        The exit status: 0; 2 for a mistake in the command, found before anything is loaded; 1 for
        a later failure; 130 after Ctrl+C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["help"]:
        argv = [*argv[1:2], "--help"]
    name, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    with Reporting(PROGRAM, COMMAND_LINE) as report:
        if name in ("-h", "--help"):
            print(overview())
        elif name in ("-V", "--version"):
            print(f"LocalDiT {__version__}")
        elif name not in COMMANDS:
            raise UsageError(_unknown(name, argv))
        else:
            command = COMMANDS[name]
            module = importlib.import_module(f".{command.module}", __name__)
            report.prog = f"{PROGRAM} {name}"
            if command.parser is None:
                getattr(module, name)(rest)
            else:
                args = getattr(module, command.parser)().parse_args(rest)
                report.debug = args.debug
                args.run(args)
    return report.status


def overview() -> str:
    """Return the text of `localdit --help`."""
    width = max(map(len, COMMANDS))
    lines = [
        f"usage: {PROGRAM} COMMAND ...",
        "",
        "Text to image, image to image and inpainting with window attention.",
        "",
        "commands:",
        *(f"  {name:{width}}  {command.help}" for name, command in COMMANDS.items()),
        "",
        "examples:",
        f'  {PROGRAM} generate "a large red circle at the top left on blue" -o circle.png',
        f'  {PROGRAM} edit circle.png "a large green circle at the top left on yellow"',
        f"  {PROGRAM} COMMAND --help",
        "",
        "options:",
        "  -h, --help     show this text, or the help of a command",
        "  -V, --version  show the version",
    ]
    return "\n".join(lines)


def _unknown(name: str, argv: Sequence[str]) -> str:
    """Return the error about a first argument that is not a command."""
    everything = f"`{PROGRAM} --help` lists the commands"
    if name.startswith("-"):
        return f"there is no option {name} before a command; {everything}"
    if " " in name:
        return f"the command is missing; did you mean `{PROGRAM} generate {shlex.join(argv)}`?"
    known = {**{command: command for command in COMMANDS}, **ALSO_CALLED}
    close = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f"did you mean {known[close[0]]!r}? " if close else ""
    return f"there is no command {name!r}; {hint}{everything}"
