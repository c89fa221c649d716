"""Compare time and memory of LocalDiT with Diffusers' PixArt and Sana.

    python -m benchmarks.denoiser --pixels 512 1024 2048 --task inference training
    python -m benchmarks.denoiser --pixels 512 1024 2048 4096 --depth own
    python -m benchmarks.denoiser --pixels 1024 2048 --depth own --against sana --context local f32

Sana-0.6B and the LocalDiT `f32` have latents of 32 x 32 pixels, and each latent is a token.

The models run in turns in one process. Peak memory is measured in a separate process for each
model. Results are saved after each case as a table, a plot, and JSON with every time.
"""

from __future__ import annotations

import argparse
import itertools
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import command_line, tables
from .cases import LOCALDIT, RIVALS, Case
from .provenance import circumstances
from .results import summary
from .worker import ROOT, WorkerError, encode, in_own_process

FULL = "full"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = command_line.Parser(
        prog="benchmarks.denoiser",
        description="Compare time and memory of LocalDiT with Diffusers' PixArtTransformer2DModel "
        "and SanaTransformer2DModel of the same width, all with random weights.",
    )
    command_line.add_shared(parser, sides=[512, 1024], repeats=5)
    parser.set_defaults(context=None)  # depends on the rival
    add = parser.add_argument
    add("--against", nargs="+", choices=[*RIVALS], default=["pixart"],
        help="PixArt-XL-2, or Sana-0.6B at its own tokens of 32 x 32 pixels; without --context, "
        "compared with the LocalDiT of the same latents (default: pixart)")  # fmt: skip
    add("--task", nargs="+", choices=["inference", "training"], default=["inference"],
        help="a forward pass, or forward, backward and AdamW (default: inference)")  # fmt: skip
    add("--mode", nargs="+", choices=["eager", "compiled"], default=["eager"],
        help="eager, or with each block compiled (default: eager)")  # fmt: skip
    add("--depth", nargs="+", choices=["equal", "own"], default=["equal"],
        help="equal: --layers each; own: LocalDiT 18, the others 28 (default: equal)")  # fmt: skip
    add("--layers", metavar="N", type=command_line.positive, default=2,
        help="for equal depth (default: 2; LocalDiT's shifts repeat every 4)")  # fmt: skip
    add("--measured-layers", metavar="N", type=_measured, default=1,
        help="for own depth: derive it from models of 0 and N layers, in training of 1 and 1 + N, "
        f"N rounded up to a multiple of 4 for LocalDiT (default: 1); {FULL}: all")  # fmt: skip
    return parser


def _measured(text: str) -> int | None:
    return None if text == FULL else command_line.positive(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every case.

    Returns:
        The exit status: 0; 2 for an error in the command; 1 if a case failed; 130 if
        interrupted, with the results so far saved.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    args = parser.parse_args(argv)
    _require_whole_tokens(parser, args)
    stem = command_line.prepare_output(parser, args.output, "denoiser")
    try:
        about = in_own_process("provenance:describe", device=args.device)
        if "error" in about:
            parser.error(about["error"])
        about |= circumstances("benchmarks.denoiser", argv, ROOT)
        about["options"] = {**vars(args), "output": str(args.output)}
        return measure_all(make_cases(args, about["device"]), about, stem)
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; results so far: {stem}.*", file=sys.stderr)
        return 130


def make_cases(args: argparse.Namespace, device: str) -> list[Case]:
    """Return the cases that the options select, small images first."""
    kinds = itertools.product(
        args.against, args.dtype, args.task, args.mode, args.depth, args.pixels
    )
    return [
        Case(
            pixels=pixels,
            dtype=dtype,
            task=task,
            mode=mode,
            depth=depth,
            layers=args.layers if depth == "equal" else args.measured_layers,
            against=against,
            contexts=contexts_of(against, args.context),
            batch_size=args.batch_size,
            text_tokens=args.text_tokens,
            device=device,
            repeats=args.repeats,
            warm_up=args.warm_up,
        )
        for against, dtype, task, mode, depth, pixels in kinds
    ]


def contexts_of(against: str, given: Sequence[str] | None) -> tuple[str, ...]:
    """Return the LocalDiTs to compare with a rival: the given ones, or that of its latents."""
    latents = RIVALS[against].latents
    own = next(context for context, one in LOCALDIT.items() if one.latents == latents)
    return tuple(dict.fromkeys(given or [own]))


def _require_whole_tokens(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with status 2 unless each side is a multiple of the pixels of every token."""
    for against in args.against:
        models = [*(LOCALDIT[one] for one in contexts_of(against, args.context)), RIVALS[against]]
        for pixels, model in itertools.product(args.pixels, models):
            multiple = model.latents.pixels_per_token
            if pixels % multiple:
                parser.error(
                    f"argument --pixels: {pixels} given; {model.name} needs a multiple of "
                    f"{multiple}"
                )


def measure_all(cases: Sequence[Case], about: dict[str, Any], stem: Path) -> int:
    """Measure the cases one by one; print and save after each."""
    records: list[dict[str, Any]] = []
    print(tables.head(tables.COLUMNS), flush=True)
    for number, case in enumerate(cases, start=1):
        print(f"{number} of {len(cases)}: {tables.what(encode(case))}", file=sys.stderr)
        record = measure(case)
        records.append(record)
        print("\n".join(tables.rows(record)), flush=True)
        tables.save(stem, about, records)
        _draw(records, stem.with_suffix(".png"))
    growth = tables.exponent_table(records)
    print("\n".join(["", *([growth, ""] if growth else []), tables.notes(about, records), ""]))
    print(f"saved as {stem}.json, .md and, if it could be drawn, .png")
    return 1 if any("error" in record for record in records) else 0


def measure(case: Case) -> dict[str, Any]:
    """Measure times and memory of one case in separate processes; "error" if one fails."""
    record: dict[str, Any] = {"case": encode(case), "tokens": case.tokens}
    try:
        results = in_own_process("worker:times", case=encode(case))
        for denoiser in case.denoisers:
            result = results[denoiser.name]
            for run in result["runs"]:
                run["memory"] = in_own_process(
                    "worker:memory",
                    case=encode(case),
                    denoiser=denoiser.name,
                    layers=run["layers"],
                    attention=result["attention"],
                )
    except WorkerError as error:
        return {**record, "error": str(error)}
    return {**record, "results": results, "summary": summary(case, results)}


def _draw(records: Sequence[dict[str, Any]], png: Path) -> None:
    from .plot import draw

    try:
        draw(records, png)
    except ModuleNotFoundError as error:
        if len(records) == 1:  # say it once
            print(f"benchmarks.denoiser: {error}", file=sys.stderr)


if __name__ == "__main__":
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # or a child process would keep running
    sys.exit(main())
