"""Parsing, errors in one line, exit statuses."""

import os
import subprocess
import sys

import pytest

from localdit.errors import Field, FieldValueError, Vocabulary
from localdit.parsing import Parser, UsageError, run


@pytest.fixture
def parser():
    parser = Parser(prog="program")
    parser.add_argument("picture")
    parser.add_argument("prompt", nargs="*")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--debug", action="store_true")
    return parser


def test_options_may_stand_anywhere(parser):
    args = parser.parse_args(["a.png", "--seed", "3", "a cat", "--guidance-scale=2", "a dog"])
    assert (args.picture, args.prompt, args.seed) == ("a.png", ["a cat", "a dog"], 3)
    assert parser.parse_args(["--seed", "3", "a.png"]).prompt == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["a.png", "--sead", "3"], "unknown option --sead; did you mean --seed?"),
        (["a.png", "--guidence-scale=2"], "did you mean --guidance-scale?"),
        (["a.png", "--xyzzy"], "unknown option --xyzzy (see `program --help`)"),
        (["a.png", "--seed", "x"], "--seed: invalid int value: 'x' (see `program --help`)"),
        ([], "the following arguments are required: picture"),
    ],
)
def test_mistakes_give_one_line(parser, argv, message, capsys):
    with pytest.raises(SystemExit) as raised:
        parser.parse_args(argv)
    assert raised.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("program: error: ") and said.count("\n") == 1
    assert message in said


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (UsageError("--height is 3"), 2, "program: error: --height is 3\n"),
        (
            FieldValueError("{field} is 3", field=Field("height")),
            1,
            "program: error: --height is 3\n",
        ),
        (ValueError("too\n  late"), 1, "program: error: too late\n"),
        (KeyError(), 1, "program: error: KeyError\n"),
        (KeyboardInterrupt(), 130, "program: interrupted\n"),
    ],
)
def test_statuses_and_lines(parser, error, status, message, capsys):
    def work(args):
        raise error

    names = Vocabulary({"height": "--height"})
    assert run(parser, ["a.png"], work, names) == status
    assert capsys.readouterr().err == message
    assert run(parser, ["a.png", "--debug"], work, names) == status
    said = capsys.readouterr().err
    assert said.endswith(message)
    assert ("Traceback" in said) == (status != 130)


def test_success_has_status_0(parser):
    seen = []
    assert run(parser, ["a.png"], seen.append) == 0
    assert seen[0].picture == "a.png"


def test_a_closed_pipe_prints_no_error():
    program = """
import sys
from localdit.errors import Field, FieldValueError, Vocabulary
from localdit.parsing import Parser, run
def work(args):
    while True:
        print("x" * 1000)
parser = Parser(prog="program")
parser.add_argument("--debug", action="store_true")
sys.exit(run(parser, [], work))
"""
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    os.read(reader, 10)
    os.close(reader)
    assert process.communicate(timeout=30)[1] == ""
    assert process.returncode == 1
