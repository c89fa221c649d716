"""The program that trains: `train.py`, `localdit train` and `python -m localdit.training`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from localdit.training.options import make_parser, parse_args
from localdit.training.shutdown import StopRequest, TrainingStopped, run_and_exit


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Set the run up and train; print errors that a user can mend in one line.

    Args:
        argv: the options, by default the process's.
        prog: the program's name in messages, by default the script's.

    Returns:
        The exit code: 0, or 1 after an error.
    """
    parser = make_parser(prog)
    args = parse_args(argv, parser)
    stop = StopRequest()
    stop.listen()

    # Loading PyTorch takes seconds: `--help` answers before, and signals are caught.
    from localdit.machine import hide_loading_bars
    from localdit.training.session import set_up
    from localdit.training.trainer import train

    hide_loading_bars()
    try:
        session = set_up(args, stop)
        if session is not None:
            train(session)
    except TrainingStopped as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    run_and_exit(lambda: main(prog="localdit train"))
