"""Write training-options.md from the command lines: `python docs/make_options.py`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from localdit.training import parser as training
from localdit.training.encode.__main__ import make_parser as make_encode_parser

PAGE = Path(__file__).with_name("training-options.md")
INTRODUCTION = """# Training options

`python docs/make_options.py` generates this page from the command lines.
[Training](guides/train.md) shows the options in use. If the default is empty, the description
explains it.
"""


def page() -> str:
    """Return the text of the page."""
    commands = [
        ("`train.py`", training.make_parser()),
        ("`python -m localdit.training.encode`", make_encode_parser()),
    ]
    sections = [INTRODUCTION]
    for name, parser in commands:
        sections.append(f"## {name}\n")
        sections += [_table(group) for group in parser._action_groups if _options(group)]
    return "\n".join(sections)


def _table(group: argparse._ArgumentGroup) -> str:
    title = (group.title or "").capitalize()
    lines = [f"### {title}\n", "| option | default | |", "|---|---|---|"]
    lines += [f"| {_names(option)} | {_default(option)} | {_help(option)} |"
              for option in _options(group)]  # fmt: skip
    return "\n".join(lines) + "\n"


def _options(group: argparse._ArgumentGroup) -> list[argparse.Action]:
    return [action for action in group._group_actions if action.dest != "help"]


def _names(option: argparse.Action) -> str:
    return f"`{', '.join(option.option_strings)}`" + "".join(_kind(option))


def _kind(option: argparse.Action) -> Iterator[str]:
    """Yield the choices, or a note that several values are allowed."""
    if option.choices:
        yield "<br>" + ", ".join(f"`{choice}`" for choice in option.choices)
    elif option.nargs == "+":
        yield "<br>one or more"


def _default(option: argparse.Action) -> str:
    if option.required:
        return "*required*"
    if option.nargs == 0:
        return "off"
    return "" if option.default in (None, []) else f"`{option.default}`"


def _help(option: argparse.Action) -> str:
    text = " ".join((option.help or "").split()).replace("%%", "%").replace("|", "\\|")
    return text[:1].upper() + text[1:]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
