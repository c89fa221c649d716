"""`infer_t2i.py` and `infer_i2i.py`: the commands, with prompts and settings of their own."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..config import Config
from . import options
from .drawing import draw, fit_size, make
from .job import Job, plan
from .parsing import Parser, run
from .saving import Output

if TYPE_CHECKING:
    from ..pipelines import LocalDiTPipeline

Kind = Literal["t2i", "i2i"]


def build_parser(kind: Kind) -> Parser:
    """The arguments of text to image ("t2i") or image to image ("i2i")."""
    doing = "Make pictures from prompts" if kind == "t2i" else "Change a picture to follow prompts"
    parser = Parser(
        description=f"{doing} with LocalDiT. Started bare, it uses prompts of its own.",
        epilog="Settings that are not given come from config.py, or suit the model in the box. "
        "Every PNG carries its own.",
    )
    options.add_prompt_options(parser)
    if kind == "i2i":
        parser.add_argument(
            "--image", type=Path, help="to start from (default: the first that infer_t2i.py saved)"
        )
        options.add_strength(parser)
    options.add_drawing(parser, size="the Config's, or the model's own")
    return parser


def main(kind: Kind, config: Config, argv: Sequence[str] | None = None) -> int:
    """Run one of the scripts.

    Pictures are saved as soon as they are made, as `output/t2i_000.png`, `output/t2i_001.png` and
    so on; numbers continue, and no picture is ever written over.

    Args:
        kind: "t2i" or "i2i".
        config: the settings that the command line does not change.
        argv: the arguments, by default those of the process.

    Returns:
        The exit status, as `parsing.run` says.
    """

    def work(args: argparse.Namespace) -> None:
        job = plan(args, kind, config=config, own_prompts=lambda preset: getattr(preset, kind))
        draw(job, _with_image if kind == "i2i" else lambda job, _: job)

    return run(build_parser(kind), argv, work, options.CALLED)


def _with_image(job: Job, pipe: LocalDiTPipeline) -> Job:
    """Start from the first picture that text to image saved; it is made if there is none."""
    if job.image is not None:
        return job
    folder = job.output.folder
    saved = sorted(folder.glob("t2i_[0-9]*.png"))
    if not saved:
        print(f"There is no picture of infer_t2i.py in {folder} yet; making one to start from.")
        first = replace(job, prompts=job.preset.t2i[:1], output=Output(folder, "t2i"))
        saved = make(replace(first, config=fit_size(first, pipe)), pipe)
    return replace(job, image=saved[0])
