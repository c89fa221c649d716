"""`localdit train`: check the options, then hand over to Accelerate.

    localdit train --data-root pictures --image-size 512
    localdit train --config_file ddp.yaml --num_processes 4 -- --data-root pictures --image-size 512

The options before `--` are those of `accelerate launch`; the others are those of the training.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from ..parsing import Parser
from ..training.options import parse_args
from ..training.parser import make_parser

PROGRAM = "localdit train"
MODULE = "localdit.training"
DESCRIPTION = f"""Train a LocalDiT on captioned pictures.

    {PROGRAM} --data-root pictures --image-size 512 --batch-size 4
    {PROGRAM} --num_processes 4 -- --data-root pictures --image-size 512

Options of `accelerate launch` go before a `--`. Without them, the settings of `accelerate config`
are used if there are any, else all GPUs of the machine.
"""


def train(argv: Sequence[str]) -> None:
    """Check the options of the training, then launch it.

    A single process replaces this one, so that its exit status is that of the training.

    Args:
        argv: options of `accelerate launch`, `--`, and those of the training; or the latter alone.

    Raises:
        SystemExit: with 2 for a mistake in the options, with 1 if a process fails.
    """
    words = list(argv)
    place = words.index("--") if "--" in words else -1
    launcher, options = words[: max(place, 0)], words[place + 1 :]
    parser = make_parser(PROGRAM)
    parser.usage = "%(prog)s [options of accelerate launch --] --data-root DATA [options]"
    parser.description = DESCRIPTION
    parser.hint = "; options of accelerate launch go before a --"
    parse_args(options, parser)  # --help and mistakes end here
    _launch(parser, launcher, options)


def _launch(parser: Parser, before: list[str], options: list[str]) -> None:
    """Let Accelerate start the processes and wait for them."""
    from accelerate.commands import launch
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    def replace_process(args: argparse.Namespace) -> None:
        _replace_process(args, keep_threads=any("threads" in option for option in before))

    # It warns of every option that is not given; the training reports what it runs on.
    logging.getLogger(launch.__name__).setLevel(logging.ERROR)
    launcher: Any = launch.launch_command_parser()
    launcher.error = lambda message: parser.error(f"accelerate launch: {message}")
    args = launcher.parse_args([*before, "--module", MODULE, *options])
    if args.training_script != MODULE:
        parser.error(f"{args.training_script!r} before -- is no option of accelerate launch")
    launch.simple_launcher = replace_process
    try:
        launch.launch_command(args)
    except ChildFailedError:  # the process has reported the error
        raise SystemExit(1) from None
    except (AssertionError, ImportError, OSError, ValueError) as error:
        parser.error(f"accelerate launch: {' '.join(str(error).split())}")


def _replace_process(args: argparse.Namespace, keep_threads: bool) -> None:
    """Replace this process by the training.

    If Accelerate's launcher stayed the parent of a single training, a signal would end the launcher
    and leave the training running.

    Args:
        args: those of Accelerate.
        keep_threads: whether to keep their number of threads. It is one by default, which suits
            many processes on one machine.
    """
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    command, environment = prepare_simple_launcher_cmd_env(args)
    if not keep_threads and "OMP_NUM_THREADS" not in os.environ:
        environment.pop("OMP_NUM_THREADS", None)
    sys.stdout.flush()
    os.execvpe(command[0], command, environment)
