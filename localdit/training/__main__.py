"""The program that trains: `train.py`, `localdit train` and `python -m localdit.training`."""

from __future__ import annotations

from collections.abc import Sequence

from localdit.parsing import say
from localdit.training.options import parse_args
from localdit.training.parser import make_parser
from localdit.training.shutdown import StopRequest, TrainingStopped, process_rank, run_and_exit


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Set up a run and train. An error that a user can mend is printed in one line.

    Args:
        argv: the options, by default those of the process.
        prog: name of the program in messages, by default that of the script.

    Returns:
        The exit code: 0, or 1 after an error.

    Raises:
        KeyboardInterrupt: after Ctrl-C in a dry run, and after a second one in training.
    """
    parser = make_parser(prog)
    args = parse_args(argv, parser)
    stop = StopRequest()
    if not args.dry_run:  # it has no steps between which to stop
        stop.listen()

    # Loading PyTorch takes seconds. Before that, `--help` answers and signals are caught.
    import torch

    from localdit.machine import hide_loading_bars
    from localdit.training.session import set_up
    from localdit.training.trainer import train

    hide_loading_bars()
    try:
        session = set_up(args, stop)
        if session is not None:
            train(session)
    except (TrainingStopped, ChildProcessError) as error:
        alone = isinstance(error, ChildProcessError) or not torch.distributed.is_initialized()
        if (rank := process_rank()) == "0":
            say(f"{parser.prog}: error: {error}", "stderr")
        elif alone:  # the others do not know of it
            say(f"{parser.prog}: error: process {rank}: {error}", "stderr")
        return 1
    return 0


if __name__ == "__main__":
    run_and_exit(lambda: main(prog="localdit train"))
