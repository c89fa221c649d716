"""`localdit info`: a checkpoint, a folder or a PNG, and what this machine computes with."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..parsing import Parser
from . import arguments
from .arguments import usage_errors

if TYPE_CHECKING:
    import torch

PLAIN = ("seed",)  # numbers without separators


def build_parser() -> Parser:
    """Return the parser."""
    parser = Parser(
        prog="localdit info",
        usage="%(prog)s [PATH] [options]",
        description="Describe a checkpoint file or a Diffusers folder: sizes, live and dead "
        "parameters, what is missing. Then describe this machine: device, dtype, the "
        "implementation of window attention and why it is chosen. Of a PNG, show the settings "
        "that made it.",
    )
    parser.add_argument("path", metavar="PATH", nargs="?",
        help="a checkpoint file, a Diffusers folder, a PNG, or 'box', the model that comes with "
        "LocalDiT")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments.add_machine(parser)
    arguments.add_debug(parser)
    parser.set_defaults(run=info)
    return parser


def info(args: argparse.Namespace) -> None:
    """Print the description.

    Raises:
        UsageError: the path or the device is missing.
    """
    sections: dict[str, dict[str, Any]] = {}
    with usage_errors():
        path = Path(arguments.named_model(args.path)) if args.path else None
        if path is not None and not path.exists():
            raise FileNotFoundError(
                f"there is no {path}; expected a checkpoint, a Diffusers folder or a PNG"
            )
    if path is not None and path.suffix.lower() == ".png":
        from ..images import read_metadata

        found = read_metadata(path)
        sections[str(path)] = found or {"settings": "none: LocalDiT did not make it, or it changed"}
    else:
        if path is not None:
            from .contents import contents_of

            sections |= contents_of(path)
            if sections[str(path)]["kind"] == "LoRA":  # it does not name its model
                path = None
        sections["machine"] = machine(arguments.read(arguments.MachineOptions, args), path)
    print(json.dumps(sections, indent=1) if args.json else text(sections))


def machine(chosen: arguments.MachineOptions, path: Path | None) -> dict[str, Any]:
    """Return the facts about this machine, for the model at a path or one of the released shape."""
    from ..machine import device_name, versions
    from ..utils import resolve_device, resolve_dtype
    from .contents import attention_shape

    with usage_errors():
        device = resolve_device(chosen.device)
        dtype = resolve_dtype(chosen.dtype, device)
    backend, why = window_attention_path(device, dtype, **attention_shape(path))
    return {
        "device": str(device),
        "name": device_name(device),
        "chosen": "as asked for" if chosen.device else _why(device.type),
        "dtype": str(dtype).removeprefix("torch."),
        "window attention": backend,
        "because": why,
        "versions": versions(),
    }


def window_attention_path(
    device: torch.device, dtype: torch.dtype, window_size: int, num_heads: int, head_dim: int
) -> tuple[str, str]:
    """Return the implementation of window attention that the backend "auto" chooses, and why.

    On a GPU that can run the Triton kernel, the kernel is tried, once per process.

    Returns:
        "triton" or "torch"; and the reason, in words.
    """
    import torch

    from ..models.backends import why_not_triton, why_not_trusted
    from ..models.windows import WindowGrid

    qkv = torch.empty(1, window_size**2, 3 * num_heads * head_dim, device=device, dtype=dtype)
    grid = WindowGrid(window_size, window_size, window_size)
    reason = why_not_triton(qkv, grid, num_heads)
    if reason is None and device.type == "cuda":
        reason = why_not_trusted(qkv.device, dtype, window_size, num_heads, head_dim)
    if reason is None and device.type == "cuda":
        return "triton", "it agrees with PyTorch's operations on this device"
    return "torch", f"the Triton kernel is not used: {reason or 'it needs a CUDA device'}"


def _why(device: str) -> str:
    return {
        "cuda": "PyTorch finds a CUDA GPU",
        "mps": "PyTorch finds an Apple GPU and no CUDA GPU",
        "cpu": "PyTorch finds neither a CUDA nor an Apple GPU",
    }[device]


def text(sections: dict[str, dict[str, Any]]) -> str:
    """Return the sections as text."""
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
