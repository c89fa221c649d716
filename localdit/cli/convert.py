"""`localdit convert`: a checkpoint file to a Diffusers folder, or back."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..parsing import Parser, output_argument, path_argument
from . import arguments
from .arguments import usage_errors

if TYPE_CHECKING:
    import torch

    from ..checkpoint import CheckpointReport


def build_parser() -> Parser:
    """Return the parser."""
    parser = Parser(
        prog="localdit convert",
        usage="%(prog)s INPUT [OUTPUT] [options]",
        description="Convert a checkpoint file to a Diffusers transformer folder, or a folder to a "
        ".safetensors file. Without OUTPUT, check a checkpoint file and describe it.",
        epilog="example: localdit convert output/LocalDiT-1024.pt output/LocalDiT-1024",
    )
    add = parser.add_argument
    add("input", metavar="INPUT", type=path_argument,
        help="a checkpoint file (.safetensors, .pt), a Diffusers folder, or 'box', the model that "
        "comes with LocalDiT")  # fmt: skip
    add("output", metavar="OUTPUT", type=output_argument, nargs="?",
        help="the folder or .safetensors file to write")  # fmt: skip
    add("--global-context", choices=["fold", "draw"], default="fold",
        help="for files like the released one, which lack the global context: 'fold' replaces it "
        "by its expected value, 'draw' initialises it at random from --seed (default: "
        "fold)")  # fmt: skip
    add("--seed", metavar="N", type=int, help="seed for --global-context draw")
    add("--dtype", choices=["float32", "float16", "bfloat16"],
        help="dtype of the weights (default: that of INPUT)")  # fmt: skip
    add("--overwrite", action="store_true", help="replace OUTPUT if it exists")
    arguments.add_debug(parser)
    parser.set_defaults(run=convert)
    return parser


def convert(args: argparse.Namespace) -> None:
    """Convert, and print what was read and written."""
    with usage_errors():
        source = Path(arguments.named_model(str(args.input)))
        if not source.exists():
            raise FileNotFoundError(
                f"there is no {source}; expected a checkpoint file or a Diffusers folder"
            )

    import torch

    from ..checkpoint import convert_to_diffusers, convert_to_single_file

    dtype = getattr(torch, args.dtype) if args.dtype else None
    with usage_errors():
        report = _check(source, args, dtype)
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


def _check(
    source: Path, args: argparse.Namespace, dtype: torch.dtype | None
) -> CheckpointReport | None:
    """Refuse what can be refused before any weights are read; describe a checkpoint file."""
    from ..checkpoint import inspect_checkpoint
    from ..models.conversion import open_transformer, refuse_taken_file, refuse_taken_folder

    if args.output is None:
        if source.is_dir():
            raise ValueError(f"{source} is a folder: name the .safetensors file to write.")
        if dtype is not None or args.overwrite:
            raise ValueError("--dtype and --overwrite are for OUTPUT, and there is none: name it.")
    if not source.is_dir():
        report = inspect_checkpoint(source, global_context=args.global_context, seed=args.seed)
        if args.output is not None:
            refuse_taken_folder(args.output, args.overwrite, source)
        return report
    if (args.global_context, args.seed) != ("fold", None):
        raise ValueError("--global-context and --seed are for checkpoint files, not folders.")
    refuse_taken_file(args.output, args.overwrite)
    open_transformer(source, dtype)
    return None
