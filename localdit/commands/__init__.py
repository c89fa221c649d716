"""The command line: `localdit COMMAND ...`, one module for each command.

A command's module has `build_parser()` and `main(argv)`, and is imported when the command is given.
"""

from __future__ import annotations

import difflib
import importlib
import shlex
import sys
from collections.abc import Sequence

from .. import __version__

PROGRAM = "localdit"
COMMANDS = {
    "generate": "make pictures from prompts",
    "edit": "change a picture to follow a prompt",
    "inpaint": "repaint the white parts of a mask in a picture",
    "info": "what is in a checkpoint or folder, and what this machine computes with",
    "convert": "a checkpoint file to a Diffusers folder, or back",
    "train": "train on captioned pictures, with Accelerate",
    "bench": "a short measurement of window attention on this machine",
    "demo": "a web page to play with",
}
# What other programs call these.
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
    "serve": "demo",
    "gradio": "demo",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name; without any, print the help.

    Args:
        argv: the arguments, by default those of the process.

    Returns:
        The exit status: 0; 2 for a mistake in the command, found before anything is loaded; 1 for
        a failure later; 130 when interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["help"]:
        argv = [*argv[1:2], "--help"]
    if not argv or argv[0] in ("-h", "--help"):
        print(overview())
        return 0
    name, *rest = argv
    if name in ("-V", "--version"):
        print(f"LocalDiT {__version__}")
        return 0
    if name not in COMMANDS:
        print(f"{PROGRAM}: error: {_unknown(name, argv)}", file=sys.stderr)
        return 2
    command = importlib.import_module(f".{name}", __name__)
    try:
        return int(command.main(rest))
    except SystemExit as leaving:  # how argparse ends: 0 after --help, 2 after a mistake
        return leaving.code if isinstance(leaving.code, int) else 1


def overview() -> str:
    """What `localdit --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [
        f"usage: {PROGRAM} COMMAND ...",
        "",
        "Pictures from text, and from text and pictures, with small attention windows.",
        "",
        "commands:",
        *(f"  {name:{width}}  {what}" for name, what in COMMANDS.items()),
        "",
        "examples:",
        f'  {PROGRAM} generate "a large red circle on a blue background" -o circle.png',
        f'  {PROGRAM} edit circle.png "a large green circle on a blue background"',
        f"  {PROGRAM} COMMAND --help",
        "",
        "options:",
        "  -h, --help     this text, or a command's",
        "  -V, --version  the version",
    ]
    return "\n".join(lines)


def _unknown(name: str, argv: Sequence[str]) -> str:
    """What to say of a command that is none."""
    everything = f"`{PROGRAM} --help` lists the commands"
    if name.startswith("-"):
        return f"there is no option {name} before a command; {everything}"
    if " " in name:
        return f"a command comes first; did you mean `{PROGRAM} generate {shlex.join(argv)}`?"
    known = {**{command: command for command in COMMANDS}, **ALSO_CALLED}
    close = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f"did you mean {known[close[0]]!r}? " if close else ""
    return f"there is no command {name!r}; {hint}{everything}"
