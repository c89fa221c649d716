"""`localdit convert`: a checkpoint file to a Diffusers folder, or back."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import options
from .parsing import Parser, UsageError, run

if TYPE_CHECKING:
    from ..checkpoint import CheckpointReport

CALLED = {
    "`torch_dtype`": "--dtype",
    "`global_context='draw'`": "--global-context draw",
    "`global_context`": "--global-context",
    "`seed`": "--seed",
    "Choose another name, or overwrite it.": "Choose another name, or give --overwrite.",
}


def build_parser(prog: str = "localdit convert") -> Parser:
    """The arguments."""
    parser = Parser(
        prog=prog,
        usage="%(prog)s INPUT [OUTPUT] [options]",
        description="Convert a checkpoint file to a Diffusers transformer folder, or a folder to a "
        ".safetensors file; without OUTPUT, check a checkpoint file and say what is in it.",
        epilog=f"example: {prog} output/LocalDiT-1024.pt output/LocalDiT-1024",
    )
    add = parser.add_argument
    add("input", metavar="INPUT", type=Path,
        help="checkpoint file (.safetensors, .pt), Diffusers folder, or 'box', the model that "
        "comes with LocalDiT")  # fmt: skip
    add("output", metavar="OUTPUT", type=Path, nargs="?", help="folder, or .safetensors file")
    add("--global-context", choices=["fold", "draw"], default="fold",
        help="for the released kind of file, which lacks it: fold it to its expectation (default), "
        "or draw it at random from --seed")  # fmt: skip
    add("--seed", metavar="N", type=int, help="of --global-context draw")
    add("--dtype", choices=["float32", "float16", "bfloat16"],
        help="of the weights (default: as in the input)")  # fmt: skip
    add("--overwrite", action="store_true", help="replace an earlier OUTPUT")
    options.add_debug(parser)
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "localdit convert") -> int:
    """Run the command; returns the exit status."""
    return run(build_parser(prog), argv, convert, CALLED)


def convert(args: argparse.Namespace) -> None:
    """Do what the arguments say, and print what was found and written.

    Raises:
        UsageError: if it can't be done; nothing was loaded.
    """
    source = Path(options.named_model(str(args.input)))
    if not source.exists():
        raise UsageError(f"there is no {source}; expected a checkpoint file or a Diffusers folder")

    import torch

    from ..checkpoint import convert_to_diffusers, convert_to_single_file

    try:
        report = _check(source, args)
    except (OSError, TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    dtype = getattr(torch, args.dtype) if args.dtype else None
    if args.output is not None and source.is_dir():
        report = convert_to_single_file(
            source, args.output, torch_dtype=dtype, overwrite=args.overwrite
        )
    elif args.output is not None:
        report = convert_to_diffusers(
            source,
            args.output,
            torch_dtype=dtype,
            overwrite=args.overwrite,
            global_context=args.global_context,
            seed=args.seed,
        )
    print(report)
    if args.output is not None:
        print(f"Wrote {args.output}")


def _check(source: Path, args: argparse.Namespace) -> CheckpointReport | None:
    """Refuse what can be refused before any weights are read; what is in a file."""
    from ..checkpoint import inspect_checkpoint
    from ..models.conversion import refuse_taken_file, refuse_taken_folder, transformer_folder

    if not source.is_dir():
        report = inspect_checkpoint(source, global_context=args.global_context, seed=args.seed)
        if args.output is not None:
            refuse_taken_folder(args.output, args.overwrite)
        return report
    if args.output is None:
        raise ValueError(f"{source} is a folder: name the .safetensors file to write.")
    if (args.global_context, args.seed) != ("fold", None):
        raise ValueError("--global-context and --seed are for checkpoint files, not folders.")
    transformer_folder(source)
    refuse_taken_file(args.output, args.overwrite)
    return None
