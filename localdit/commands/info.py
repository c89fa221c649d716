"""`localdit info`: what is in a checkpoint or folder, and what this machine computes with."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import options
from .parsing import Parser, UsageError, run

PLAIN = ("seed",)  # numbers without separators


def build_parser() -> Parser:
    """The arguments."""
    parser = Parser(
        prog="localdit info",
        usage="%(prog)s [PATH] [options]",
        description="Say what is in a checkpoint file or a Diffusers folder: sizes, live and dead "
        "parameters, what is missing. Then, what this machine computes with: device, dtype, the "
        "path of window attention and why. Of a PNG, the settings that made it.",
    )
    parser.add_argument("path", metavar="PATH", nargs="?",
        help="a checkpoint file, a Diffusers folder, a PNG, or 'box', the model that comes with "
        "LocalDiT")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON instead")
    options.add_machine(parser)
    options.add_debug(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run(build_parser(), argv, info, options.CALLED)


def info(args: argparse.Namespace) -> None:
    """Print what the arguments ask for.

    Raises:
        UsageError: if there is no such thing.
    """
    sections: dict[str, dict[str, Any]] = {}
    path = Path(options.named_model(args.path)) if args.path else None
    if path is not None and not path.exists():
        raise UsageError(f"there is no {path}; expected a checkpoint, a Diffusers folder or a PNG")
    if path is not None and path.suffix.lower() == ".png":
        from ..images import read_metadata

        found = read_metadata(path)
        sections[str(path)] = found or {"settings": "none: it was not made by LocalDiT, or changed"}
    else:
        if path is not None:
            from ..checkpoint.contents import contents_of

            sections |= contents_of(path)
            if sections[str(path)]["kind"] == "LoRA":  # of a model that it does not tell
                path = None
        sections["machine"] = machine(args, path)
    print(json.dumps(sections, indent=1) if args.json else text(sections))


def machine(args: argparse.Namespace, path: Path | None) -> dict[str, Any]:
    """What is computed with here, for the model of a path or one of the released shape."""
    from ..checkpoint.contents import attention_shape
    from ..machine import device_name, versions, window_attention_path
    from ..utils import resolve_device, resolve_dtype

    try:
        device = resolve_device(args.device)
        dtype = resolve_dtype(args.dtype, device)
    except ValueError as error:
        raise UsageError(str(error)) from error
    backend, why = window_attention_path(device, dtype, **attention_shape(path))
    return {
        "device": str(device),
        "name": device_name(device),
        "chosen": "as asked for" if args.device else _why(device.type),
        "dtype": str(dtype).removeprefix("torch."),
        "window attention": backend,
        "because": why,
        "versions": versions(),
    }


def _why(device: str) -> str:
    return {
        "cuda": "PyTorch finds a CUDA GPU",
        "mps": "PyTorch finds Apple's GPU, and none of CUDA",
        "cpu": "PyTorch finds no GPU, neither CUDA nor MPS",
    }[device]


def text(sections: dict[str, dict[str, Any]]) -> str:
    """The sections for people."""
    width = max(len(name) for section in sections.values() for name in section)
    lines: list[str] = []
    for title, section in sections.items():
        lines += ["", title]
        for name, value in section.items():
            values = value if isinstance(value, list) else [value]
            for number, one in enumerate(values):
                lines.append(
                    f"  {name if number == 0 else '':{width}}  {_shown(name, one)}".rstrip()
                )
    return "\n".join(lines[1:])


def _shown(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {one}" for key, one in value.items())
    return f"{value:,}" if isinstance(value, int) and name not in PLAIN else str(value)
