"""What the documentation says can be done, and does not go stale."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("recipes/**/*.md")])
TESTED = re.compile(r"<!-- tested -->\n```bash\n(.*?)```", re.DOTALL)
LINK = re.compile(r"\]\(([^)#:]+)(#[^)]*)?\)")


def test_the_table_of_options_is_that_of_the_command_lines():
    spec = importlib.util.spec_from_file_location("make_options", ROOT / "docs/make_options.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = (ROOT / "docs/training-options.md").read_text(encoding="utf-8")
    assert written == module.page(), "write it anew: python docs/make_options.py"


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_to_files_that_are_there(page):
    for target, _ in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_tests_that_the_guarantee_names_are_there():
    text = (ROOT / "docs/guarantee.md").read_text(encoding="utf-8")
    commands = re.findall(r"`pytest ([^`]+)`", text)
    assert commands
    for command in commands:
        path = next(word for word in command.split() if word.startswith("tests/"))
        source = (ROOT / path).read_text(encoding="utf-8")
        for words in re.findall(r"-k (?:\"([^\"]+)\"|(\S+))", command):
            assert re.search(f"def test_\\w*{''.join(words)}", source), command


def test_the_code_of_the_page_on_speed_runs_as_it_stands():
    page = (ROOT / "docs/guides/speed.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 4
    names: dict = {}
    for block in blocks:
        exec(block.replace("pipe(prompt)", "pipe(prompt, num_inference_steps=2)"), names)
    assert names["image"].size == (128, 128)
    assert names["pipe"].text_encoder is None
    for call in re.findall(r"`(pipe\(prompt, .*?\))`", page):
        assert eval(call[:-1] + ", height=32, width=32)", names).images, call


@pytest.mark.slow
def test_the_commands_of_the_training_page_run_as_they_stand(tmp_path):
    """In their order, on fewer pictures and for fewer steps."""
    for name in ("train.py", "infer_t2i.py", "config.py", "localdit", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    page = (ROOT / "docs/guides/train.md").read_text(encoding="utf-8")
    script = "set -euo pipefail\n" + "\n".join(TESTED.findall(page))
    script = re.sub(r"--count \d+", "--count 24", script)
    script = re.sub(r"--max-train-steps \d+", "--max-train-steps 4", script)
    script = re.sub(r"(max-train-steps\": )\d+", r"\g<1>2", script)
    script = re.sub(r"--validation-samples \d+", "--validation-samples 2", script)
    python = Path(sys.executable).parent
    result = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PATH": f"{python}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert list((tmp_path / "output/own").glob("*.png"))
