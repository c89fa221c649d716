"""Encode ahead of training: `python -m localdit.training.encode --help` lists the options.

Latents and text states are written in shards. A shard appears whole or not at all, so the same
command resumes after any interruption. A shard depends only on the data, the encoders and the
options, so any number of processes can share the work. Heavy imports are inside functions, so
`--help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

from localdit.config import Config
from localdit.parsing import Parser, folder_argument, say
from localdit.training.options import check_limits
from localdit.training.parser import HelpFormatter, add_data_options, add_encoder_options
from localdit.training.shutdown import TrainingStopped, run_and_exit

if TYPE_CHECKING:
    from localdit.training.processes import Agreement

PROGRAM = "python -m localdit.training.encode"
DESCRIPTION = f"""Encode pictures and captions ahead of training, once for all epochs.

    {PROGRAM} --data-root pictures --image-size 512 --output encoded
    python train.py --data-root encoded --image-size 512

Run the same command again to resume. With `accelerate launch` or `torchrun`, several processes
share the work.
"""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the options; an invalid one ends the program with a message."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.num_workers is None:
        args.num_workers = min(Config().num_workers, os.cpu_count() or 1)
    try:
        check_limits(vars(args))
    except ValueError as error:
        parser.error(str(error))
    return args


def make_parser() -> Parser:
    """Make the parser of all options, in groups."""
    parser = Parser(prog=PROGRAM, description=DESCRIPTION, formatter_class=HelpFormatter)
    defaults = Config()
    add_data_options(parser.add_argument_group("data"), defaults)
    add_encoder_options(parser.add_argument_group("encoders"), defaults)
    _add_encoding_options(parser.add_argument_group("encoding"), defaults)
    return parser


def _add_encoding_options(group: argparse._ArgumentGroup, defaults: Config) -> None:
    add = group.add_argument
    add("--output", type=folder_argument, required=True,
        help="folder to write to: new, empty, or started by the same command")  # fmt: skip
    add("--window-size", type=int, default=defaults.window_size,
        help="side of the model's windows in tokens; buckets consist of whole windows where "
        "possible")  # fmt: skip
    add("--patch-size", type=int, default=2,
        help="side of the model's tokens in latents; buckets consist of whole tokens")  # fmt: skip
    add("--samples-per-shard", type=int, default=1000, help="number of samples per tar file")
    add("--batch-size", type=int, default=8,
        help="pictures per batch on each GPU; a CPU always uses 2, which is fastest")  # fmt: skip
    add("--mixed-precision", choices=["no", "bf16"], default="no",
        help="precision of the VAE when pictures are encoded")  # fmt: skip
    add("--dry-run", action="store_true",
        help="report what would be encoded and the disk space it needs, and exit")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Examine the data, report the disk space that encoding needs, and write the missing shards.

    Returns:
        The exit code: 0, or 1 after an error message.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse_args(argv)

    from localdit.machine import hide_loading_bars
    from localdit.training.encode.job import check_folder, encode, open_folder, prepare, report
    from localdit.training.processes import Agreement, connect

    hide_loading_bars()
    try:
        accelerator = connect(timedelta(days=1))  # the last shard of a process may take long
    except RuntimeError as error:
        sys.exit(f"{PROGRAM}: error: {error}")
    agreement, is_main = Agreement(accelerator), accelerator.is_main_process
    command = shlex.join([*PROGRAM.split(), *argv])
    try:
        job = agreement.on_all(
            lambda: prepare(args, command, accelerator.device, quiet=not is_main)
        )
        _require_same(agreement, job.manifest.digest())
        agreement.on_main(lambda: check_folder(args.output, job.manifest))
        if is_main:
            say(job.describe(args.output))
        agreement.on_main(lambda: job.require_space(args.output))
        if args.dry_run:
            return 0
        empty_text = job.empty_text()
        shards = agreement.on_main(lambda: open_folder(args.output, job.manifest, empty_text))
        share = shards[accelerator.process_index :: accelerator.num_processes]
        agreement.on_all(lambda: encode(args, job, share, quiet=not is_main))
        summary = agreement.on_main(lambda: report(args, job))
        if is_main:
            say(summary)
    except TrainingStopped as stopped:
        if is_main:
            say(f"{PROGRAM}: error: {stopped}", "stderr")
        return 1
    finally:
        accelerator.end_training()
    return 0


def _require_same(agreement: Agreement, digest: str) -> None:
    """Check that all processes have the same manifest."""
    if len(set(agreement.gathered([digest]))) > 1:
        raise TrainingStopped(
            "The processes see different data or encoders. Give all of them the same files."
        )


if __name__ == "__main__":
    run_and_exit(main)
