"""`localdit train`: hands the training over to Accelerate.

    localdit train --data-root pictures --image-size 512
    localdit train --config_file ddp.yaml --num_processes 4 -- --data-root pictures --image-size 512

What stands before a `--` are options of `accelerate launch`, the rest is the training's.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from ..training.options import make_parser, parse_args
from .parsing import Parser

PROGRAM = "localdit train"
MODULE = "localdit.training"
DESCRIPTION = f"""Train a LocalDiT on captioned pictures.

    {PROGRAM} --data-root pictures --image-size 512 --batch-size 4
    {PROGRAM} --num_processes 4 -- --data-root pictures --image-size 512

Options of `accelerate launch` go before a `--`. Without them all GPUs of the machine are used, or
what `accelerate config` has written down.
"""


def build_parser() -> Parser:
    """The training's arguments."""
    parser = make_parser(PROGRAM)
    parser.usage = "%(prog)s [options of accelerate launch --] --data-root DATA [options]"
    parser.description = DESCRIPTION
    parser.hint = "; options of accelerate launch go before a --"
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Check the options, then launch.

    A single process is become, and its exit status is the training's.

    Returns:
        The exit status: 2 for a mistake in the options; 1 if a process failed; 130 when
        interrupted; 0.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    before, options = _split(argv)
    parser = build_parser()
    parse_args(options, parser)  # --help and mistakes end here
    try:
        _launch(parser, before, options)
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return 130
    return 0


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """Options of the launcher and of the training."""
    if "--" not in argv:
        return [], argv
    place = argv.index("--")
    return argv[:place], argv[place + 1 :]


def _launch(parser: Parser, before: list[str], options: list[str]) -> None:
    """Have Accelerate start the processes and wait for them.

    Raises:
        SystemExit: with 2 if Accelerate does not like its options, with 1 if a process fails.
    """
    from accelerate.commands import launch
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    def become(args: argparse.Namespace) -> None:
        _become(args, one_thread=any("threads" in option for option in before))

    # It tells of every option that is not given; the training says what it runs on.
    logging.getLogger(launch.__name__).setLevel(logging.ERROR)
    launcher: Any = launch.launch_command_parser()
    launcher.error = lambda message: parser.error(f"accelerate launch: {message}")
    args = launcher.parse_args([*before, "--module", MODULE, *options])
    if args.training_script != MODULE:
        parser.error(f"{args.training_script!r} before -- is no option of accelerate launch")
    launch.simple_launcher = become
    try:
        launch.launch_command(args)
    except ChildFailedError:  # it has said why
        raise SystemExit(1) from None
    except (AssertionError, ImportError, OSError, ValueError) as error:
        parser.error(f"accelerate launch: {' '.join(str(error).split())}")


def _become(args: argparse.Namespace, one_thread: bool) -> None:
    """Replace this process by the training.

    As the parent of a single training, Accelerate's launcher dies of a signal that only the
    training should get, which then goes on alone.

    Args:
        args: Accelerate's.
        one_thread: keep to the number of threads that is in them. By default it is one, which is
            meant for many processes on one machine.
    """
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    command, environment = prepare_simple_launcher_cmd_env(args)
    if not one_thread and "OMP_NUM_THREADS" not in os.environ:
        environment.pop("OMP_NUM_THREADS", None)
    sys.stdout.flush()
    os.execvpe(command[0], command, environment)
