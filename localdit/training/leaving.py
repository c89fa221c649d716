"""Ending a process of several without taking the interpreter apart."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable


def run_and_leave(main: Callable[[], int]) -> None:
    """Call `main` and end the process with its exit code, at once.

    As the interpreter is taken apart, the destructor of PyTorch's process group (gloo, seen with
    2.13) waits for a thread of its own, which waits for the interpreter: now and then a process
    that had finished would hang for ever. So nothing is taken apart. `SystemExit` is left alone,
    for the command line ends by it before there is any process group.
    """
    try:
        code = main()
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
