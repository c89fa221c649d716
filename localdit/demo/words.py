"""What the page says, as HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any


def header(about: Sequence[str]) -> str:
    """The name, and what is at work."""
    facts = " · ".join(map(escape, about))
    return f'<header class="name"><h1>LocalDiT</h1><p>{facts}</p></header>'


def note(text: str) -> str:
    """A line about what goes on."""
    return f'<p class="note" role="status">{escape(text)}</p>'


def problem(text: str) -> str:
    """Why nothing was drawn."""
    return f'<p class="problem" role="alert">{escape(text)}</p>'


def progress(step: int, total: int) -> str:
    """How far a drawing is."""
    done = f'<i style="width: {100 * step / total:.0f}%"></i>'
    return f'<div class="bar">{done}</div>' + note(f"Step {step} of {total}")


def settings_list(settings: Mapping[str, Any]) -> str:
    """What a picture was made from, its prompt first, without what is empty."""
    facts = "".join(
        f"<li><span>{escape(name.replace('_', ' '))}</span> {escape(str(value))}</li>"
        for name, value in settings.items()
        if name != "prompt" and value not in ("", None)
    )
    prompt = escape(str(settings.get("prompt", "")))
    return f'<p class="prompt">{prompt}</p><ul class="settings">{facts}</ul>'
