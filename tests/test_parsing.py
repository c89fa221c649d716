"""Parsing, errors in one line, exit statuses, and output that may fail."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from localdit.errors import Field, FieldValueError, Vocabulary
from localdit.parsing import (
    Parser,
    UsageError,
    folder_argument,
    name_argument,
    one_line,
    output_argument,
    path_argument,
    run,
    text_argument,
)


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


def test_the_home_folder_is_meant_also_where_the_shell_leaves_it(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert path_argument("~/a.png") == Path("/home/me/a.png")
    assert name_argument("~/a") == "/home/me/a"
    for name in ("google/flan-t5-xxl", "box", "-", "a~b", "~nobody_of_this_name/a"):
        assert name_argument(name) == str(path_argument(name)) == name


def test_a_slash_at_the_end_makes_an_output_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert output_argument("a.png") == Path("a.png")
    assert output_argument("a/") == Path("a")
    for name in ("a.png/", "w.safetensors/"):
        with pytest.raises(argparse.ArgumentTypeError, match="named like a file, but would be a"):
            output_argument(name)
    Path("a.png").mkdir()
    assert output_argument("a.png/") == Path("a.png")


def test_no_folder_is_named_like_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "a.JXL", "deep/a.heic", "a.pt", "a.ckpt", "a.safetensors"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"{name} is named like a file, but"):
            folder_argument(name)
    Path("a.png").mkdir()
    for name in ("a.png", "run.2", "v1.2", ".hidden", "a.pt/run"):
        assert folder_argument(name) == Path(name)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["a.png", "--sead", "3"], "unknown option --sead; did you mean --seed?"),
        (["a.png", "--guidence-scale=2"], "did you mean --guidance-scale?"),
        (["a.png", "--guidance", "2"], "unknown option --guidance; did you mean --guidance-scale?"),
        (["a.png", "--prompt", "a cat"], "unknown option --prompt; write the prompt without it"),
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
        (FileNotFoundError(2, "No such file", "a.txt"), 1, "program: error: a.txt: No such file\n"),
        (OSError("disk is gone"), 1, "program: error: disk is gone\n"),
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


# Output


def program(work):
    """A program that runs the lines of `work`."""
    return f"""
import sys
from localdit.errors import Field, FieldValueError, Vocabulary
from localdit.parsing import Parser, run, say
def work(args):
    {work}
parser = Parser(prog="program")
parser.add_argument("--debug", action="store_true")
sys.exit(run(parser, [], work))
"""


def test_a_closed_pipe_prints_no_error():
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", program("while True: print('x' * 1000)")],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    os.read(reader, 10)
    os.close(reader)
    assert process.communicate(timeout=30)[1] == ""
    assert process.returncode == 1


@pytest.mark.parametrize(
    "encoding", ["cp1252", "ascii", "latin-1", "utf-8", "utf-16", "ascii:surrogateescape"]
)
def test_characters_that_the_output_lacks_are_printed_as_escapes(encoding):
    text = "caf\xe9 \U0001f534 \udcff"
    done = subprocess.run(
        [sys.executable, "-c", program(f"print({text!a}); raise ValueError({text!a})")],
        env=os.environ | {"PYTHONIOENCODING": encoding},
        capture_output=True,
    )
    assert done.returncode == 1
    encoding = encoding.split(":")[0]
    expected = text.encode(encoding, "backslashreplace").decode(encoding)
    assert done.stdout.decode(encoding) == f"{expected}\n"
    assert done.stderr.decode(encoding) == f"program: error: {expected}\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("redirection", "printed", "said"),
    [
        (">&-", (0, ""), (0, "")),
        (">/dev/full", (1, "program: error: can't print: No space left on device\n"),
         (0, "warning: can't print: No space left on device\n")),
        ("2>&- >/dev/full", (1, ""), (0, "")),
        ("2>/dev/full >/dev/full", (1, ""), (0, "")),
    ],
)  # fmt: skip
def test_output_that_fails_ends_in_a_status_and_no_work_that_says_something(
    tmp_path, redirection, printed, said, unbuffered
):
    env = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    for work, (status, error) in (("print('a')", printed), (SAY_AND_WRITE, said)):
        command = [sys.executable, "-c", program(work)]
        done = subprocess.run(
            ["sh", "-c", f'"$@" {redirection}', "sh", *command],
            env=env, capture_output=True, text=True, cwd=tmp_path,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (status, "")
        assert done.stderr.count("\n") == error.count("\n")
        if not unbuffered:
            assert done.stderr == error
    assert (tmp_path / "last").exists()


SAY_AND_WRITE = "for _ in 'abc': say('x' * 100_000)\n    open('last', 'w')"


def test_after_the_reader_has_gone_work_goes_on(tmp_path):
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", '"$@" | head -c 1', "sh",
         sys.executable, "-c", program(SAY_AND_WRITE)],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "x", "")
    assert (tmp_path / "last").exists()


def test_one_line_shows_what_would_forge_a_line_or_steer_a_terminal(parser, capsys):
    text = "a\r\nb\x1b[2J\0\x85\u2028\u202e\u3000caf\xe9\U0001f534"
    shown = r"a\r\nb\x1b[2J\x00\x85\u2028\u202e" + "\u3000caf\xe9\U0001f534"
    assert one_line(text) == shown
    with pytest.raises(SystemExit):
        parser.parse_args(["a.png", f"--{text}"])
    assert f"unknown option --{shown}" in capsys.readouterr().err


def test_text_in_utf8_is_read_where_the_locale_has_another_encoding():
    assert text_argument("a caf\xe9") == "a caf\xe9"
    assert text_argument("a caf\udcc3\udca9") == "a caf\xe9"  # as decoded in ASCII
    for word in ("a \udcff", "a \ud83d"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not UTF-8 text"):
            text_argument(word)
