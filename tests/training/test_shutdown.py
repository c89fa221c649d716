import os
import re
import signal
import subprocess
import sys
from unittest.mock import patch

import pytest
from accelerate.state import AcceleratorState

from localdit.training.__main__ import main
from localdit.training.shutdown import SIGNALS, StopRequest


@pytest.fixture
def stop():
    before = {name: signal.getsignal(getattr(signal, name)) for name in SIGNALS}
    request = StopRequest()
    request.listen()
    yield request
    for name, handler in before.items():
        signal.signal(getattr(signal, name), handler)


@pytest.mark.parametrize("name", SIGNALS)
def test_signals_are_only_recorded(stop, name):
    assert stop.signal is None
    os.kill(os.getpid(), getattr(signal, name))
    assert stop.signal == name


def test_a_second_interrupt_ends_the_program(stop):
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


# Objects whose destructors would wait forever, when `main` returns or the interpreter shuts down.
PROGRAM = """
import sys, threading
from localdit.training.shutdown import keep_until_exit, run_and_exit

class Waits:
    def __del__(self):
        threading.Event().wait()

kept = Waits()

def main():
    keep_until_exit(Waits())
    print("done")
    {end}

run_and_exit(main)
"""


@pytest.mark.parametrize(
    ("end", "code", "message"),
    [
        ("return 0", 0, ""),
        ("return 1", 1, ""),
        ("raise KeyError('a mistake')", 1, "KeyError: 'a mistake'"),
        ("raise KeyboardInterrupt", 130, "Interrupted.\n"),
    ],
)
def test_a_process_exits_with_its_code_and_waits_for_nothing(end, code, message):
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(end=end)], capture_output=True, text=True, timeout=30
    )
    assert result.returncode == code
    assert result.stdout == "done\n"
    assert message in result.stderr
    assert ("Traceback" in result.stderr) == (code == 1 and bool(message))


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"RANK": "1"}, "Interrupted.\n"),  # of a container, not of processes
        ({"RANK": "1", "WORLD_SIZE": "2"}, ""),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "Interrupted.\n"),
    ],
)
def test_the_first_of_several_processes_speaks(ranks, message):
    program = PROGRAM.format(end="raise KeyboardInterrupt")
    environment = os.environ | ranks
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert result.stderr == message


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"RANK": "1"}, "error: --data-root: not found: gone"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "error: process 1: .*MASTER_ADDR"),
    ],
)
def test_an_error_of_a_process_that_knows_of_no_other_is_printed(
    ranks, message, monkeypatch, capsys
):
    monkeypatch.setattr(StopRequest, "listen", lambda self: None)
    AcceleratorState._reset_state(reset_partial_state=True)
    with patch.dict(os.environ, {"ACCELERATE_USE_CPU": "true"} | ranks):  # Accelerate adds some
        assert main(["--data-root", "gone"]) == 1
    AcceleratorState._reset_state(reset_partial_state=True)
    assert re.search(message, capsys.readouterr().err)


def test_system_exit_passes_through():
    program = PROGRAM.replace("Waits()", "None").format(end="sys.exit(2)")
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 2
