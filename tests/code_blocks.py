"""Find the code blocks of a docs page, and run them in the order of the page.

An HTML comment on the line before a block changes how it is tested:

    <!-- not run: needs the released weights -->     only its syntax is checked
    <!-- slow -->                                    only `pytest -m slow` runs it
"""

import json
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[\w-]*)\n(?P<code>.*?)^ *```$", re.M | re.S)
MARK = re.compile(r"<!-- (?:(?P<slow>slow)|not run: (?P<reason>[^>]+)) -->\s*\Z")
RUN = {"python", "bash"}
READ = {"text", "json", "bibtex"}  # listings, output, data


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    code: str
    line: int  # line of the page where the code begins
    slow: bool = False
    not_run: str = ""  # the reason


def find_blocks(text: str) -> list[Block]:
    """Return the fenced blocks of a page, in order."""
    blocks = []
    for match in FENCE.finditer(text):
        mark = MARK.search(text[: match.start()])
        code = re.sub(rf"^{match['indent']}", "", match["code"], flags=re.M)
        line = text[: match.start("code")].count("\n") + 1
        slow, reason = (bool(mark["slow"]), mark["reason"] or "") if mark else (False, "")
        blocks.append(Block(match["language"], code, line, slow, reason))
    return blocks


def check_syntax(block: Block) -> None:
    """Raise SyntaxError, ValueError or CalledProcessError if a block is not valid code."""
    if block.language == "python":
        compile(block.code, f"line {block.line}", "exec")
    elif block.language == "bash":
        subprocess.run(["bash", "-n"], input=block.code, text=True, check=True)
    elif block.language == "json":
        json.loads(block.code)


def run_page(blocks: list[Block], page: str) -> None:
    """Run blocks in the current folder, all Python blocks in one namespace."""
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks:
        print(f"{page}:{block.line}", flush=True)
        if block.language == "bash":
            script = "set -euo pipefail\n" + block.code
            if subprocess.run(["bash", "-c", script]).returncode:
                sys.exit(f"{page}:{block.line}: this block failed\n{block.code}")
        else:
            exec(compile("\n" * (block.line - 1) + block.code, page, "exec"), names)


def save(blocks: list[Block], path: Path) -> None:
    """Write blocks for `python tests/code_blocks.py PATH PAGE` to run."""
    path.write_text(json.dumps([asdict(block) for block in blocks]), encoding="utf-8")


if __name__ == "__main__":
    sys.path[0] = ""  # the current folder, as `python` sets it
    stored = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    run_page([Block(**fields) for fields in stored], sys.argv[2])
