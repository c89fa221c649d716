import subprocess
import sys

import pytest

# An object whose end would be an endless wait, as it is taken apart with the interpreter.
PROGRAM = """
import sys, threading
from localdit.training.leaving import run_and_leave

class Waits:
    def __del__(self):
        threading.Event().wait()

kept = Waits()

def main():
    print("done")
    {end}

run_and_leave(main)
"""


@pytest.mark.parametrize(
    ("end", "code", "told"),
    [
        ("return 0", 0, ""),
        ("return 1", 1, ""),
        ("raise KeyError('a mistake')", 1, "KeyError: 'a mistake'"),
        ("raise KeyboardInterrupt", 1, "KeyboardInterrupt"),
    ],
)
def test_a_process_ends_with_its_code_and_waits_for_nothing(end, code, told):
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(end=end)], capture_output=True, text=True, timeout=30
    )
    assert result.returncode == code
    assert result.stdout == "done\n"
    assert told in result.stderr


def test_the_command_line_ends_by_itself():
    program = PROGRAM.replace("kept = Waits()", "").format(end="sys.exit(2)")
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 2
