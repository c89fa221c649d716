"""The structure of the package: imports without circles, file names, and the drawing of it."""

import ast
import subprocess
import sys
from collections import Counter
from graphlib import CycleError
from pathlib import Path

import grimp
import pytest

from .test_docs import load_script

ROOT = Path(__file__).parents[1]
FILES = sorted(ROOT.glob("localdit/**/*.py"))


@pytest.fixture(scope="module")
def graph():
    """Return the imports of all modules, with those for type checkers and inside functions."""
    return grimp.build_graph("localdit", cache_dir=None)


def circles(graph) -> list[list[str]]:
    """Return the strongly connected components of more than one module (Tarjan's algorithm)."""
    number, lowest, stack, found = {}, {}, [], []

    def visit(module):
        number[module] = lowest[module] = len(number)
        stack.append(module)
        for target in graph.find_modules_directly_imported_by(module):
            if target not in number:
                visit(target)
                lowest[module] = min(lowest[module], lowest[target])
            elif target in stack:
                lowest[module] = min(lowest[module], number[target])
        if lowest[module] == number[module]:
            place = stack.index(module)
            component = sorted(stack[place:])
            del stack[place:]
            if len(component) > 1:
                found.append(component)

    for module in sorted(graph.modules):
        if module not in number:
            visit(module)
    return found


def test_modules_import_without_a_circle(graph):
    assert len(graph.modules) == len(FILES)
    assert circles(graph) == []


def test_a_circle_is_found(tmp_path, monkeypatch):
    """One import is for type checkers and one is inside a function."""
    package = tmp_path / "circular"
    package.mkdir()
    sources = {
        "__init__": "",
        "a": "from . import b",
        "b": "def f():\n    from .c import x",
        "c": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .a import y",
        "d": "from . import a",
    }
    for name, source in sources.items():
        (package / f"{name}.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    graph = grimp.build_graph("circular", cache_dir=None)
    assert circles(graph) == [["circular.a", "circular.b", "circular.c"]]


def test_imports_keep_to_the_layers():
    """The contracts are in pyproject.toml."""
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_two_files_have_one_name():
    names = Counter(path.name for path in FILES)
    assert {name for name, count in names.items() if count > 1} == {"__init__.py", "__main__.py"}


def test_no_function_reads_its_locals():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.Name) and node.id == "locals"), f"{path}:{node.lineno}"


# The drawing


def test_arrows_that_follow_from_others_are_left_out():
    script = load_script("make_architecture")
    found = {"a": {"b", "c", "d"}, "b": {"c"}, "c": {"d"}, "d": set()}
    kept = script.without_implied(found)
    assert kept == {"a": {"b"}, "b": {"c"}, "c": {"d"}, "d": set()}
    with pytest.raises(CycleError):
        script.without_implied({"a": {"b"}, "b": {"a"}})


def test_the_drawing_shows_imports_for_type_checkers_and_inside_functions():
    found = load_script("make_architecture").imports()
    assert found["models"] >= {"checkpoint"}
    assert "pipelines" in found["cli"] and "training" in found["cli"]  # only in functions
    assert all("cli" not in targets for targets in found.values())
