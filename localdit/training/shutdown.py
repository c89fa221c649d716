"""Ending a run: the signals that ask for it, the error that stops it, and the exit.

Nothing heavy is imported here, because signals are caught before PyTorch is loaded. The handlers of
signals, and what `keep_until_exit` keeps, last until the process ends.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from localdit.parsing import put, say

# Sent by schedulers and people: a cluster's time limit, Ctrl-C, `scancel --signal=USR1`.
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")

_kept: list[object] = []


class TrainingStopped(Exception):
    """Training can't continue. Every process raises this at the same point with one message."""


class StopRequest:
    """Records the first signal. The run obeys it between two steps.

    A second Ctrl-C ends the program at once.

    Attributes:
        signal: name of the signal that arrived, or None.
    """

    def __init__(self) -> None:
        self.signal: str | None = None

    def listen(self) -> None:
        """Handle the signals from now on. Must be called in the main thread."""
        for name in SIGNALS:
            if hasattr(signal, name):  # Windows has no SIGUSR1
                signal.signal(getattr(signal, name), self._record)

    def _record(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name


def process_rank() -> str:
    """Return the number of this process among those started together; "0" if it is alone.

    Without WORLD_SIZE, RANK has another meaning, such as the number of a container.
    """
    return os.environ.get("RANK", "0") if os.environ.get("WORLD_SIZE", "1") != "1" else "0"


@contextmanager
def deaths_of_workers(go_on: str) -> Iterator[None]:
    """Say what to do if a process that reads pictures dies: PyTorch's error can come at any time.

    Args:
        go_on: how to go on after that.

    Raises:
        ChildProcessError: in this process, while the others do not know.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise ChildProcessError(
            f"A process that reads pictures was killed. Often, the machine ran out of memory. "
            f"{str(error).strip()} Lower --num-workers, and {go_on}."
        ) from error


def keep_until_exit(thing: object) -> None:
    """Keep an object until `run_and_exit` ends the process, so that its destructor never runs.

    The destructor of a DDP model would wait for a thread of gloo that waits for the interpreter.
    """
    _kept.append(thing)


def run_and_exit(main: Callable[[], int]) -> None:
    """Call `main` and end the process with its exit code, at once.

    When the interpreter shuts down, the destructor of PyTorch's process group (gloo, seen with
    2.13) waits for one of its threads, which waits for the interpreter. Sometimes a finished
    process would hang forever. So the shutdown is skipped. `SystemExit` passes through, because
    the command line raises it before there is a process group.
    """
    try:
        code = main()
    except SystemExit:
        raise
    except KeyboardInterrupt:
        if process_rank() == "0":
            say("Interrupted.", "stderr")
        code = 130
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        put("", stream)
    os._exit(code)
