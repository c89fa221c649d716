"""The program `localdit`: its help, its version, and unknown commands."""

import argparse
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

import localdit
from localdit.cli import ALSO_CALLED, COMMANDS, main
from localdit.cli.drawing import script_parser
from localdit.parsing import folder_argument, name_argument, output_argument, path_argument
from localdit.training.encode.__main__ import make_parser as encode_parser
from localdit.training.parser import make_parser as train_parser

HEAVY = ["torch", "diffusers", "transformers", "accelerate", "gradio", "numpy", "PIL"]


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"], ["help"]])
def test_without_arguments_it_lists_the_commands(argv, capsys):
    assert main(argv) == 0
    said = capsys.readouterr()
    assert said.err == ""
    for name, command in COMMANDS.items():
        assert f"{name} " in said.out and command.help in said.out


@pytest.mark.parametrize("argv", [["--version"], ["-V"], ["generate", "--version"]])
def test_the_version(argv, capsys):
    assert main(argv) == 0
    assert capsys.readouterr().out == f"LocalDiT {localdit.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["genrate", "a cat"], "there is no command 'genrate'; did you mean 'generate'?"),
        (["txt2img", "a cat"], "did you mean 'generate'?"),
        (["Edit"], "did you mean 'edit'?"),
        (["xyzzy"], "there is no command 'xyzzy'; `localdit --help` lists the commands"),
        (["--seed", "3"], "there is no option --seed before a command"),
        (["a red circle", "-o", "x.png"], "mean `localdit generate 'a red circle' -o x.png`?"),
    ],
)
def test_an_unknown_command_gives_one_line(argv, message, capsys):
    assert main(argv) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("localdit: error: ") and said.err.count("\n") == 1
    assert message in said.err


def test_names_from_other_programs_lead_to_commands():
    assert set(ALSO_CALLED.values()) <= set(COMMANDS)


def parsers():
    for command in COMMANDS.values():
        if command.parser:
            module = importlib.import_module(f"localdit.cli.{command.module}")
            yield getattr(module, command.parser)()
    yield from (script_parser("t2i"), script_parser("i2i"), train_parser(), encode_parser())


PATHS = (path_argument, name_argument, folder_argument, output_argument)


def test_every_path_may_start_with_the_home_folder_and_none_is_empty():
    paths = {
        "PATH", "FILE", "FOLDER", "PICTURE", "MASK", "INPUT", "OUTPUT", "PROMPTS", "CHECKPOINT",
        "--data-root", "--transformer", "--transformer-config", "--teacher", "--pretrained",
        "--vae", "--text-encoder", "--tokenizer", "--stages", "--output", "--image",
    }  # fmt: skip
    found = 0
    for parser in parsers():
        for action in parser._actions:
            if paths & {action.metavar, *action.option_strings}:
                assert action.type in PATHS, (
                    parser.prog,
                    action.dest,
                )
                with pytest.raises(argparse.ArgumentTypeError, match="it is empty"):
                    action.type("")
                found += 1
            assert action.type is not Path
    assert found > 60


def test_help_of_every_command_is_quick_since_it_imports_nothing_heavy():
    """One process asks for all of it, so that starting Python counts once."""
    program = f"""
import contextlib, io, json, sys, time
from localdit.cli import COMMANDS, main
told = {{}}
for name in COMMANDS:
    out, start = io.StringIO(), time.process_time()
    with contextlib.redirect_stdout(out):
        code = main([name, "--help"])
    heavy = [module for module in {HEAVY} if module in sys.modules]
    told[name] = [code, out.getvalue(), heavy, time.process_time() - start]
print(json.dumps(told))
"""
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert time.monotonic() - start < 10  # a fraction of a second, on a machine at rest
    told = json.loads(done.stdout)
    assert list(told) == list(COMMANDS)
    for name, (code, text, heavy, seconds) in told.items():
        assert code == 0, name
        assert text.startswith(f"usage: localdit {name}"), name
        assert heavy == [], name
        assert seconds < 1, name


def test_help_comes_first_or_last(capsys):
    assert main(["help", "edit"]) == 0
    first = capsys.readouterr().out
    assert main(["edit", "--help"]) == 0
    assert capsys.readouterr().out == first


def test_the_module_is_the_program(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "localdit", "nothing"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("localdit: error: there is no command 'nothing'")
