"""`localdit bench`: a short measurement of window attention on this machine."""

from __future__ import annotations

import argparse
import json
import os
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import Field
from ..machine import OUT_OF_MEMORY
from ..parsing import Parser
from ..sizes import check_size
from . import arguments
from .arguments import usage_errors

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
UNSTEADY = 1.5  # slowest over fastest turn, from which on the ratios say little
BUSY = 0.5  # other processes per core, from which on the ratios say little
PIXELS_PER_LATENT, PIXELS_PER_TOKEN = 8, 16  # of the models that are measured
CAVEAT = """
PyTorch chooses the attention kernel of each. A short measurement gives a rough idea; for figures
to quote, run `python -m benchmarks.denoiser` in the repository, which also measures memory,
training and whole models."""


def build_parser() -> Parser:
    """Return the parser."""
    parser = Parser(
        prog="localdit bench",
        usage="%(prog)s [options]",
        description="Time one forward pass of three denoisers: one with window attention, the same "
        "weights with full attention, and Diffusers' PixArt. They have the width of the released "
        "model, few blocks and random weights, and are timed in turns. The default measurement "
        "takes less than a minute on two cores.",
    )
    add = parser.add_argument
    add("--pixels", metavar="N", type=int, nargs="+", default=[512],
        help="sides of the square pictures in pixels, multiples of 16 (default: 512)")  # fmt: skip
    add("--layers", metavar="N", type=int, default=4,
        help="blocks per denoiser (default: 4, which covers every window shift)")  # fmt: skip
    add("--repeats", metavar="N", type=int, default=3,
        help="number of timed turns, after one warm-up turn (default: 3)")  # fmt: skip
    arguments.add_facts(parser)
    parser.set_defaults(run=bench)
    return parser


def bench(args: argparse.Namespace) -> None:
    """Measure, and print the results."""
    from ..machine import device_name, versions
    from ..utils import resolve_device, resolve_dtype

    with usage_errors():
        for pixels in args.pixels:
            check_size(Field("--pixels"), pixels, PIXELS_PER_TOKEN)
        for name in ("layers", "repeats"):
            if getattr(args, name) < 1:
                raise ValueError(f"--{name} is {getattr(args, name)}; expected at least 1")
        device = resolve_device(args.device)
        dtype = resolve_dtype(args.dtype, device)
    about = {
        "machine": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "layers": args.layers,
        "versions": versions(),
    }
    if not args.json:
        packages = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        print(f"{about['machine']}; {about['dtype']}; {packages}", flush=True)
        print(f"One forward pass, {args.layers} blocks, random weights:\n", flush=True)
        print(_row("pixels", "attention", "fastest (slowest), seconds", ": windows"))
    load, results = _load(), []
    for pixels in args.pixels:
        result = measure(pixels, args.layers, args.repeats, device, dtype)
        results.append({"pixels": pixels, "seconds": result})
        if not args.json:
            print("\n".join(_rows(pixels, result)), flush=True)
    report = about | {"load": load, "results": results}
    print(json.dumps(report, indent=1) if args.json else _notes(results, load))


def measure(
    pixels: int, layers: int, repeats: int, device: torch.device, dtype: torch.dtype
) -> dict[str, list[float]]:
    """Return the seconds of each counted turn, for each attention; none if memory runs out."""
    import torch

    from ..machine import take_turns

    side, channels = pixels // PIXELS_PER_LATENT, SHAPE["caption_channels"]
    inputs = {
        "hidden_states": torch.randn(1, 4, side, side, device=device, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, TEXT_TOKENS, channels, device=device, dtype=dtype),
        "encoder_attention_mask": torch.ones(1, TEXT_TOKENS, device=device, dtype=dtype),
        "timestep": torch.tensor([500], device=device),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }

    def forward(model: Any) -> None:
        with torch.inference_mode():
            model(**inputs)
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()

    records: dict[str, dict[str, Any]] = {name: {"seconds": []} for name in (WINDOWS, FULL, PIXART)}
    models = [_model(name, pixels, layers, device, dtype) for name in records]
    runs = [partial(forward, model) for model in models]
    take_turns(list(zip(runs, records.values(), strict=True)), warm_up=1, repeats=repeats)
    return {name: record["seconds"] for name, record in records.items()}


def _model(name: str, pixels: int, layers: int, device: torch.device, dtype: torch.dtype) -> Any:
    from diffusers import PixArtTransformer2DModel

    from ..machine import with_random_weights
    from ..models import FullAttnProcessor, LocalDiTTransformer2DModel

    kind = PixArtTransformer2DModel if name == PIXART else LocalDiTTransformer2DModel
    model = with_random_weights(
        lambda: kind(**SHAPE, num_layers=layers, sample_size=pixels // PIXELS_PER_LATENT),
        dtype,
        device,
    ).eval()
    if name == FULL:
        model.set_attn_processor(FullAttnProcessor())
    return model


def _rows(pixels: int, result: dict[str, list[float]]) -> list[str]:
    """Return the rows of the table; ratios compare the fastest turns, the least disturbed ones."""
    rows = []
    for name, seconds in result.items():
        shown, ratio = OUT_OF_MEMORY, ""
        if seconds:
            shown = f"{min(seconds):.3g} ({max(seconds):.3g})"
            ratio = f"{min(seconds) / min(result[WINDOWS]):.2f}" if result[WINDOWS] else ""
        rows.append(_row(str(pixels), name, shown, ratio))
    return rows


def _row(pixels: str, name: str, seconds: str, ratio: str) -> str:
    return f"{pixels:>6}  {name:<14}  {seconds:<26}  {ratio:>8}".rstrip()


def _notes(results: list[dict[str, Any]], load: float) -> str:
    """Return the notes below the table, on how far to trust the results; `load` is as `_load`."""
    turns = [seconds for one in results for seconds in one["seconds"].values() if seconds]
    spread = max((max(seconds) / min(seconds) for seconds in turns), default=1.0)
    if spread < UNSTEADY and load < BUSY:
        return CAVEAT
    return (
        f"\nThe machine was busy: {load:.1f} processes per core before the first turn, and the "
        f"same pass took up to\n{spread:.1f} times as long in another turn. The ratios say little; "
        f"measure again when the machine is idle.\n{CAVEAT}"
    )


def _load() -> float:
    """Return the running processes per core in the last minute; 0 if the system has no figure."""
    try:
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    except (AttributeError, OSError):
        return 0.0
