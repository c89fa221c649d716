"""The command line of `python -m localdit.training.encode`: every option, its default, its check.

Nothing heavy is imported here, so `--help` answers at once.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from localdit.config import Config
from localdit.parsing import Parser
from localdit.training.options import (
    HelpFormatter,
    add_data_options,
    add_encoder_options,
    check_data_options,
    require_positive,
)

PROGRAM = "python -m localdit.training.encode"
DESCRIPTION = f"""Encode pictures and captions ahead of training, once for all epochs.

    {PROGRAM} --data-root pictures --image-size 512 --output encoded
    python train.py --data-root encoded --image-size 512

Run again, the same command goes on where it ended. Started by `accelerate launch` or `torchrun`, as
many processes share the work.
"""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options as a flat namespace; ends the program with a message if one can't be right."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.num_workers is None:
        args.num_workers = min(Config().num_workers, os.cpu_count() or 1)
    try:
        check_data_options(vars(args))
        require_positive(vars(args), ("window_size", "samples_per_shard", "batch_size"))
    except ValueError as error:
        parser.error(str(error))
    return args


def make_parser() -> Parser:
    """The parser of all options, in groups."""
    parser = Parser(prog=PROGRAM, description=DESCRIPTION, formatter_class=HelpFormatter)
    defaults = Config()
    add_data_options(parser.add_argument_group("data"), defaults)
    add_encoder_options(parser.add_argument_group("encoders"), defaults)
    _add_encoding_options(parser.add_argument_group("encoding"), defaults)
    return parser


def _add_encoding_options(group: argparse._ArgumentGroup, defaults: Config) -> None:
    add = group.add_argument
    add("--output", type=Path, required=True,
        help="folder to write to: new, empty, or of this same command")  # fmt: skip
    add("--window-size", type=int, default=defaults.window_size,
        help="side in tokens of the model's windows, which buckets are cut to fit")  # fmt: skip
    add("--samples-per-shard", type=int, default=1000, help="samples to a tar")
    add("--batch-size", type=int, default=8,
        help="pictures per process and batch on a GPU; on a CPU 2 are fastest and are "
        "taken")  # fmt: skip
    add("--mixed-precision", choices=["no", "bf16"], default="no",
        help="precision that pictures are encoded in")  # fmt: skip
    add("--dry-run", action="store_true",
        help="say what would be encoded and what disk it takes, and stop")  # fmt: skip
