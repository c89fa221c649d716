"""Convert a LocalDiT checkpoint to a Diffusers folder, or back: `python -m localdit.checkpoint`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m localdit.checkpoint",
        description="Convert a checkpoint file to a Diffusers transformer folder, or a folder to a "
        ".safetensors file; without OUTPUT, check a checkpoint file and say what is in it.",
    )
    parser.add_argument("input", type=Path, help="checkpoint file (.safetensors, .pt) or folder")
    parser.add_argument("output", type=Path, nargs="?", help="folder, or .safetensors file")
    parser.add_argument(
        "--global-context",
        choices=["fold", "draw"],
        default="fold",
        help="for the released kind of file, which lacks it: fold it to its expectation (default), "
        "or draw it at random from --seed",
    )
    parser.add_argument("--seed", type=int, help="seed for --global-context draw")
    parser.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        help="dtype to write (default: as in the input)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier OUTPUT")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> str:
    """Do what the command line says; return what to print."""
    import torch

    from . import convert_to_diffusers, convert_to_single_file, inspect_checkpoint

    dtype = getattr(torch, args.dtype) if args.dtype else None
    context = {"global_context": args.global_context, "seed": args.seed}
    if args.input.is_dir():
        if args.output is None:
            raise ValueError(f"{args.input} is a folder: name the .safetensors file to write.")
        if context != {"global_context": "fold", "seed": None}:
            raise ValueError("--global-context and --seed are for checkpoint files, not folders.")
        report = convert_to_single_file(
            args.input, args.output, torch_dtype=dtype, overwrite=args.overwrite
        )
    elif args.output is None:
        report = inspect_checkpoint(args.input, **context)
    else:
        report = convert_to_diffusers(
            args.input, args.output, torch_dtype=dtype, overwrite=args.overwrite, **context
        )
    return f"{report}\nWrote {args.output}" if args.output else str(report)


def main(argv: list[str] | None = None) -> int:
    """Run the command: 0 if all went well, 2 for what the user can mend, told in one line."""
    args = parse_args(argv)
    try:
        print(run(args))
    except (OSError, TypeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
