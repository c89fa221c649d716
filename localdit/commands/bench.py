"""`localdit bench`: a short measurement of window attention on this machine."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..measuring import OUT_OF_MEMORY
from . import options
from .parsing import Parser, UsageError, run

if TYPE_CHECKING:
    import torch

WINDOWS, FULL, PIXART = "windows", "full attention", "PixArt"
SHAPE: dict[str, Any] = {  # of the released model and of PixArt-XL-2
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "cross_attention_dim": 16 * 72,
    "caption_channels": 4096,
    "out_channels": 4,
    "use_additional_conditions": False,
}
TEXT_TOKENS = 120
UNSTEADY = 1.5  # slowest over fastest, from where on ratios say little
BUSY = 0.5  # processes of others to a core, likewise
CAVEAT = """
Each on PyTorch's own choice of attention kernel. A short measurement shows the order of things;
figures to quote come from `python -m benchmarks.denoiser` in the repository, which also measures
memory, training and whole models."""


def build_parser() -> Parser:
    """The arguments."""
    parser = Parser(
        prog="localdit bench",
        usage="%(prog)s [options]",
        description="Measure one forward pass of the denoiser: with attention within windows, the "
        "same weights with full attention, and Diffusers' PixArt. All are of the released "
        "width, of few blocks and with random weights; they take turns. By default it is small: "
        "less than a minute on two cores.",
    )
    add = parser.add_argument
    add("--pixels", metavar="N", type=int, nargs="+", default=[512],
        help="sides of the square pictures, multiples of 16 (default: 512)")  # fmt: skip
    add("--layers", metavar="N", type=int, default=4,
        help="blocks of each (default: 4, in which windows take all their shifts)")  # fmt: skip
    add("--repeats", metavar="N", type=int, default=3, help="turns that count (default: 3)")
    add("--json", action="store_true", help="print JSON instead")
    options.add_machine(parser)
    options.add_debug(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run(build_parser(), argv, bench, options.CALLED)


def bench(args: argparse.Namespace) -> None:
    """Measure and print what the arguments ask for.

    Raises:
        UsageError: if it can't be done.
    """
    _check(args)

    from ..machine import device_name, versions
    from ..utils import resolve_device, resolve_dtype

    try:
        device = resolve_device(args.device)
        dtype = resolve_dtype(args.dtype, device)
    except ValueError as error:
        raise UsageError(str(error)) from error
    about = {
        "machine": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "layers": args.layers,
        "versions": versions(),
    }
    if not args.json:
        told = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        print(f"{about['machine']}; {about['dtype']}; {told}", flush=True)
        print(f"One forward pass, {args.layers} blocks, random weights:\n", flush=True)
        print(_row("pixels", "attention", "fastest (slowest), seconds", ": windows"))
    load, results = _load(), []
    for pixels in args.pixels:
        result = measure(pixels, args.layers, args.repeats, device, dtype)
        results.append({"pixels": pixels, "seconds": result})
        if not args.json:
            print("\n".join(_rows(pixels, result)), flush=True)
    print(
        json.dumps(about | {"load": load, "results": results}, indent=1)
        if args.json
        else _notes(results, load)
    )


def measure(
    pixels: int, layers: int, repeats: int, device: torch.device, dtype: torch.dtype
) -> dict[str, list[float]]:
    """Seconds of each kind of attention, turn by turn; none of what there is no memory for.

    Args:
        pixels: side of the picture.
        layers: blocks of each model.
        repeats: turns that count; one before does not.
    """
    from ..measuring import take_turns

    names = (WINDOWS, FULL, PIXART)
    records: list[dict[str, Any]] = [{"seconds": []} for _ in names]
    inputs = _inputs(pixels, device, dtype)
    runs = [_forward(_model(name, pixels, layers, device, dtype), inputs, device) for name in names]
    take_turns(list(zip(runs, records, strict=True)), warm_up=1, repeats=repeats)
    return {name: record["seconds"] for name, record in zip(names, records, strict=True)}


def _check(args: argparse.Namespace) -> None:
    for pixels in args.pixels:
        if pixels < 16 or pixels % 16:
            raise UsageError(f"--pixels is {pixels}; expected a multiple of 16, such as 512")
    for name in ("layers", "repeats"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name} is {getattr(args, name)}; expected at least 1")


def _model(name: str, pixels: int, layers: int, device: torch.device, dtype: torch.dtype) -> Any:
    from diffusers import PixArtTransformer2DModel

    from ..measuring import with_random_weights
    from ..models import FullAttnProcessor, LocalDiTTransformer2DModel

    kind = PixArtTransformer2DModel if name == PIXART else LocalDiTTransformer2DModel
    model = with_random_weights(
        lambda: kind(**SHAPE, num_layers=layers, sample_size=pixels // 8), dtype, device
    ).eval()
    if name == FULL:
        model.set_attn_processor(FullAttnProcessor())
    return model


def _inputs(pixels: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    import torch

    side = pixels // 8
    return {
        "hidden_states": torch.randn(1, 4, side, side, device=device, dtype=dtype),
        "encoder_hidden_states": torch.randn(
            1, TEXT_TOKENS, SHAPE["caption_channels"], device=device, dtype=dtype
        ),
        "encoder_attention_mask": torch.ones(1, TEXT_TOKENS, device=device, dtype=dtype),
        "timestep": torch.tensor([500], device=device),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _forward(model: Any, inputs: dict[str, Any], device: torch.device) -> Callable[[], None]:
    import torch

    def forward() -> None:
        with torch.inference_mode():
            model(**inputs)
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()

    return forward


def _rows(pixels: int, result: dict[str, list[float]]) -> list[str]:
    """The table's rows; of a machine that others use as well, the fastest run tells most."""
    rows = []
    for name, seconds in result.items():
        told, ratio = OUT_OF_MEMORY, ""
        if seconds:
            told = f"{min(seconds):.3g} ({max(seconds):.3g})"
            ratio = f"{min(seconds) / min(result[WINDOWS]):.2f}" if result[WINDOWS] else ""
        rows.append(_row(str(pixels), name, told, ratio))
    return rows


def _row(pixels: str, name: str, seconds: str, ratio: str) -> str:
    return f"{pixels:>6}  {name:<14}  {seconds:<26}  {ratio:>8}".rstrip()


def _notes(results: list[dict[str, Any]], load: float) -> str:
    """What the figures are worth.

    Args:
        results: as `--json` prints them.
        load: processes that ran, for each core, before the first turn.
    """
    turns = [seconds for one in results for seconds in one["seconds"].values() if seconds]
    spread = max((max(seconds) / min(seconds) for seconds in turns), default=1.0)
    if spread < UNSTEADY and load < BUSY:
        return CAVEAT
    return (
        f"\nThe machine was busy: {load:.1f} processes to a core before, and the same took up to "
        f"{spread:.1f} times as\nlong in another turn. The ratios say little; measure again when "
        f"it rests.\n{CAVEAT}"
    )


def _load() -> float:
    """Processes that ran in the last minute, for each core; 0 where the system does not tell."""
    try:
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    except (AttributeError, OSError):
        return 0.0
