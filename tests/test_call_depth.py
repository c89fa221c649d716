"""The calls from a command to window attention, as docs/architecture.md lists them."""

import re
import sys
from pathlib import Path

from localdit.cli import main
from localdit.models import backends

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "localdit"


def test_generate_reaches_window_attention_in_the_calls_that_the_docs_list(tmp_path, monkeypatch):
    """Only functions of this package count; at most 14, that of window attention included."""
    calls = []
    compute = backends.window_attention

    def observed(*arguments):
        if not calls:
            calls.append(("models/window_attention.py", compute.__name__))
            frame = sys._getframe(1)
            while frame is not None:
                path = Path(frame.f_code.co_filename)
                if path.is_relative_to(PACKAGE):
                    calls.append((path.relative_to(PACKAGE).as_posix(), frame.f_code.co_name))
                frame = frame.f_back
        return compute(*arguments)

    monkeypatch.setattr(backends, "window_attention", observed)
    options = ["--model", "box", "--steps", "1", "--device", "cpu", "-o", str(tmp_path / "a.png")]
    assert main(["generate", "a red circle on a blue background", *options]) == 0
    calls.reverse()
    assert len(calls) <= 14, calls

    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    section = page.split("## From a prompt to pixels\n")[1].split("\n## ")[0]
    listed = re.findall(r"^\d+\. `(\w+)` in `([\w./]+)`", section, re.MULTILINE)
    assert [(file, name) for name, file in listed] == calls
