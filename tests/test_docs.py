"""The docs: links, code blocks, generated pages and the reference are correct and up to date."""

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from .code_blocks import FENCE, READ, RUN, Block, check_syntax, find_blocks, save
from .warm_python import warm_python

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("recipes/**/*.md")])
CODE_PAGES = [page for page in PAGES if "```" in page.read_text(encoding="utf-8")]
LINK = re.compile(r"\]\(([^)#:]+)(#[^)]*)?\)")

# Replacements that make a block fast: the model in the box, few images, few steps.
SMALL = {
    "python": {
        r"\bConfig\(\)": "Config(ckpt_path='localdit/box', height=256, width=256)",
        r"checkpoint-100\b": "checkpoint-2",
    },
    "bash": {
        r"source .venv/bin/activate": "true",
        r"localdit bench\b": "localdit bench --pixels 128 --layers 1",
        r"--count \d+": "--count 24",
        r"--save-interval \d+": "--save-interval 2",
        r"(score --count) \d+": r"\1 4",
        r"--max-train-steps \d+": "--max-train-steps 4",
        r"(max-train-steps\": )\d+": r"\g<1>2",
        r"--validation-samples \d+": "--validation-samples 2",
    },
}


def names(page: Path) -> str:
    return str(page.relative_to(ROOT))


def runnable(page: Path) -> list[Block]:
    """Return the code of a page that is run: blocks, and inline calls with small images."""
    text = page.read_text(encoding="utf-8")
    blocks = find_blocks(text)
    calls = re.findall(r"`(pipe\(prompt, .*?)\)`", text)
    inline = "\n".join(f"{call}, height=32, width=32)" for call in calls)
    blocks += [Block("python", inline, text.count("\n"))] if calls else []
    return [block for block in blocks if block.language in RUN and not block.not_run]


def quick(page: Path) -> list[Block]:
    return [block for block in runnable(page) if not block.slow]


def has_slow(page: Path) -> bool:
    return any(block.slow for block in runnable(page))


def test_the_options_page_matches_the_command_lines():
    written = (ROOT / "docs/training-options.md").read_text(encoding="utf-8")
    assert written == load_script("make_options").page(), (
        "regenerate it: python docs/make_options.py"
    )


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_links_lead_to_existing_files(page):
    for target, _ in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", ["guarantee", "how-it-is-tested"])
def test_tests_that_a_page_names_exist(page):
    text = (ROOT / f"docs/{page}.md").read_text(encoding="utf-8")
    commands = re.findall(r"`pytest ([^`]+)`", text)
    assert commands
    for command in commands:
        path = ROOT / next(word for word in command.split() if word.startswith("tests/"))
        files = path.glob("**/*.py") if path.is_dir() else [path]
        source = "\n".join(file.read_text(encoding="utf-8") for file in files)
        for words in re.findall(r"-k (?:\"([^\"]+)\"|(\S+))", command):
            assert re.search(f"def test_\\w*{''.join(words)}", source), command


# Every block of code


@pytest.mark.parametrize("page", CODE_PAGES, ids=names)
def test_every_code_block_is_run_or_says_why_not(page):
    text = page.read_text(encoding="utf-8")
    blocks = find_blocks(text)
    assert 2 * len(blocks) == len(re.findall(r"^ *```", text, re.MULTILINE)), (
        "a fence is not closed"
    )
    assert not re.search(r"\n\n    (?![-*\d])", FENCE.sub("", text)), (
        "an indented code block: use a fence"
    )
    for block in blocks:
        assert block.language in RUN | READ, f"{page}:{block.line}: language {block.language!r}"
        assert not (block.not_run and block.language not in RUN), f"{page}:{block.line}"
        check_syntax(block)
    installs = r"\b(pip install|quickstart\.sh|git clone|wget|curl)\b"
    assert not any(re.search(installs, block.code) for block in runnable(page)), (
        "a test must not install or download anything"
    )


@pytest.fixture(scope="module")
def environment():
    with warm_python() as environment:
        yield environment


def run_blocks(page, blocks, folder, environment):
    """Run blocks beside links to the repository's files, with an empty output folder."""
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name not in ("output", "runs", "build", "dist"):
            (folder / path.name).symlink_to(path)
    (folder / "output").mkdir()
    small = [replace(block, code=make_small(block)) for block in blocks]
    save(small, folder / "blocks.json")
    command = ["python", ROOT / "tests/code_blocks.py", "blocks.json", str(page.relative_to(ROOT))]
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]


def make_small(block):
    """Return the code of a block, changed to take seconds instead of minutes."""
    code = block.code
    for pattern, small in SMALL[block.language].items():
        code = re.sub(pattern, small, code)
    return code


@pytest.mark.parametrize("page", [page for page in CODE_PAGES if quick(page)], ids=names)
def test_code_runs(page, tmp_path, environment):
    """Blocks run in the order of the page, with fewer images and fewer steps."""
    run_blocks(page, quick(page), tmp_path, environment)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in CODE_PAGES if has_slow(page)], ids=names)
def test_slow_code_runs(page, tmp_path, environment):
    run_blocks(page, runnable(page), tmp_path, environment)


def test_messages_in_troubleshooting_exist_in_the_code():
    code = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("localdit/**/*.py"))
    code = re.sub(r'"\s*\n\s*(?:\+ )?f?"', "", code)  # strings that continue on the next line
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(messages) > 20
    for message in messages:
        for part in message.replace("of 16 pixels", "of").split("..."):
            part = part.strip(" .;")
            known = part in code or message == "No module named 'config'"
            assert known, f"no error message contains {part!r}"


def test_the_file_tree_names_every_module_and_existing_files():
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    tree = text.split("## The files\n\n```text\n")[1].split("```")[0]
    folders: list[str] = []
    named = set()
    for line in tree.splitlines():
        indent = (len(line) - len(line.lstrip())) // 2
        if indent > 5:
            continue  # a comment on a separate line
        names = re.match(r"\s*((?:[\w./]+, )*[\w./]+)", line)[1].split(", ")
        folders = folders[:indent]
        for name in names:
            path = ROOT / "/".join(folders) / name
            assert path.exists(), f"{line.strip()}: no {name}"
            named.add(path)
        folders.append(names[0].rstrip("/"))
    modules = {path for path in ROOT.glob("localdit/**/*.py") if not path.stem.startswith("__")}
    assert not sorted(modules - named), "not in the file tree"


# Generated files


def load_script(name):
    """Import a script in docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_drawings_are_up_to_date():
    drawings = load_script("make_drawings").DRAWINGS
    drawings |= {"architecture": load_script("make_architecture").architecture}
    assert {path.stem for path in ROOT.glob("docs/images/*.svg")} == set(drawings)
    for name, draw in drawings.items():
        kept = (ROOT / f"docs/images/{name}.svg").read_text(encoding="utf-8")
        assert kept == draw().svg(), (
            "regenerate them: python docs/make_drawings.py, and docs/make_architecture.py"
        )


def test_drawn_windows_match_a_computation_by_hand():
    """A 4 x 4 map with shifted windows of 2: token 0 is alone, four tokens share the middle."""
    from localdit.models.windows import WindowGrid

    script = load_script("make_drawings")
    assert script.regions(WindowGrid(4, 4, 2, 1, 1)) == [
        *(0, 1, 1, 2),
        *(3, 4, 4, 5),
        *(3, 4, 4, 5),
        *(6, 7, 7, 8),
    ]


# The reference


PUBLIC = {
    line.split("`")[1]: re.findall(r"`(\w+)`", line.split("|")[2])
    for line in (ROOT / "docs/reference/index.md").read_text(encoding="utf-8").splitlines()
    if line.startswith(("| `localdit", "| [`localdit"))
}


def test_the_table_of_public_names_has_every_module_with_an_all():
    """Commands and the demo are left out: their public interface is the command line."""
    modules = set()
    for path in ROOT.glob("localdit/**/*.py"):
        statements = ast.parse(path.read_text(encoding="utf-8")).body
        named = [ast.unparse(s.targets[0]) for s in statements if isinstance(s, ast.Assign)]
        parts = path.relative_to(ROOT).with_suffix("").parts
        if "__all__" in named and parts[1] not in ("commands", "demo"):
            modules.add(".".join(part for part in parts if part != "__init__"))
    assert set(PUBLIC) == modules


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_has_a_docstring_and_is_in_the_reference(module):
    names = importlib.import_module(module).__all__
    assert sorted(PUBLIC[module]) == sorted(names)
    pages = "".join(path.read_text("utf-8") for path in ROOT.glob("docs/reference/*.md"))
    documented = {line.rsplit(".", 1)[1] for line in re.findall(r"^::: (.+)$", pages, re.MULTILINE)}
    for name in names:
        public = getattr(importlib.import_module(module), name)
        assert name in documented, f"{module}.{name} is not in docs/reference"
        if callable(public):
            assert public.__doc__ and len(public.__doc__) > 20, f"{module}.{name}"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Build the site; a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_the_site_has_every_public_name_and_every_page(site):
    inventory = zlib.decompress((site / "objects.inv").read_bytes().split(b"zlib.\n", 1)[1])
    places = {line.split()[0] for line in inventory.decode().splitlines()}
    for module, names in PUBLIC.items():
        assert module == "localdit" or places >= {f"{module}.{name}" for name in names}, module
    for page in [*ROOT.glob("docs/**/*.md"), *ROOT.glob("docs/notebooks/*.ipynb")]:
        name = page.relative_to(ROOT / "docs").with_suffix("")
        folder = name.parent if name.name in ("index", "README") else name
        assert (site / folder / "index.html").is_file() or name.name == "TRAIN", page


@pytest.mark.slow
def test_the_site_loads_nothing_from_other_servers(site):
    for path in site.glob("**/*.html"):
        page = path.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]+src=\"?(https?:[^\" >]+)", page)
        loaded += re.findall(r"<link[^>]+href=\"?(https?:[^\" >]+)", page)
        assert not loaded, path
