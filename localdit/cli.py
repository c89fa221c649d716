"""What `infer_t2i.py` and `infer_i2i.py` share: one parser, one run.

What can be wrong with a command is found before anything heavy is imported or loaded.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from . import __version__
from .config import Config

if TYPE_CHECKING:
    from .pipelines import LocalDiTPipeline

Kind = Literal["t2i", "i2i"]

# Options that set a field of the Config; errors speak of the option.
OPTIONS = {
    "ckpt_path": "--model",
    "denoising_steps": "--steps",
    "denoising_strength": "--strength",
    "guidance_scale": "--guidance-scale",
    "height": "--height",
    "width": "--width",
}


@dataclass(frozen=True)
class Preset:
    """What a bare command makes with a model."""

    t2i: list[str]
    i2i: list[str]
    negative_prompt: str
    config: dict[str, Any]  # what differs from the Config


PHOTOGRAPHS = Preset(
    t2i=[
        "a photo of a wooden boat on a calm mountain lake at sunrise, mist over the water",
        "a close-up photo of a red fox in fresh snow, soft winter light, highly detailed",
        "a street of old stone houses after the rain, warm lamps, evening, wide angle",
    ],
    i2i=["an oil painting of a boat on a lake, thick brush strokes, warm colours"],
    negative_prompt="bad quality, worst quality, low resolution, blurry",
    config={},
)
SCENES = Preset(
    t2i=[
        "a large red circle at the top left on a blue background",
        "a small yellow square at the bottom right on a green background",
        "a large white triangle in the centre on a purple background",
        "a small blue circle to the left of a large red square on a white background",
    ],
    i2i=["a large green circle at the top left on a yellow background"],
    negative_prompt="",
    config={"guidance_scale": 2.0},
)


class UsageError(Exception):
    """A mistake in the command, found before anything is loaded."""


@dataclass(frozen=True)
class Job:
    """What a command asks for, checked."""

    kind: Kind
    config: Config
    preset: Preset
    prompts: list[str]
    negative_prompt: str
    seed: int
    image: Path | None  # to start from
    output: Path


def build_parser(kind: Kind) -> argparse.ArgumentParser:
    """The arguments of text to image ("t2i") or image to image ("i2i")."""
    doing = "Make pictures from prompts" if kind == "t2i" else "Change a picture to follow prompts"
    parser = argparse.ArgumentParser(
        description=f"{doing} with LocalDiT. Started bare, it uses prompts of its own.",
        epilog="Settings that are not given come from config.py, or suit the model in the box. "
        "Every PNG carries its own.",
    )
    add = parser.add_argument
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", action="append", help="what to show; may be repeated")
    prompts.add_argument("--prompt-file", type=Path, help="a text file with one prompt a line")
    add("--negative-prompt", metavar="TEXT", help="what to steer away from, in all pictures")
    if kind == "i2i":
        add("--image", type=Path, help="to start from (default: the first that infer_t2i.py saved)")
        add("--strength", dest="denoising_strength", metavar="0..1", type=float, help="of change")
    add("--seed", type=int, default=0, help="picture i is drawn from SEED + i (default: 0)")
    add("--steps", dest="denoising_steps", metavar="N", type=int, help="denoising steps")
    add("--guidance-scale", metavar="G", type=float, help="weight of the prompt; 1: no guidance")
    add("--height", metavar="PIXELS", type=int, help="a multiple of 16")
    add("--width", metavar="PIXELS", type=int, help="a multiple of 16")
    add("--num-images", metavar="N", type=int, default=1, help="pictures of each prompt")
    add("--model", dest="ckpt_path", metavar="PATH", help="a checkpoint or a Diffusers folder")
    add("--output", metavar="FOLDER", type=Path, default=Path("output"), help="default: output")
    add("--device", help="cuda, mps or cpu (default: the first that there is)")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights")
    add("--grid", action="store_true", help="put all pictures on one sheet, too")
    add("--debug", action="store_true", help="show where an error came from")
    add("--version", action="version", version=f"LocalDiT {__version__}")
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
        The exit status: 0; 2 for a mistake in the command, found before anything is loaded; 1 for
        a failure later; 130 when interrupted.
    """
    parser = build_parser(kind)
    args = parser.parse_args(argv)
    try:
        _run(_plan(kind, config, args), args)
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"{parser.prog}: error: {message}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


# From the arguments to a job


def _plan(kind: Kind, config: Config, args: argparse.Namespace) -> Job:
    """Check what is asked for.

    Raises:
        UsageError: if it can't be done.
    """
    from .images import load_image, prepare_output_folder
    from .pipelines.prompts import check_prompts
    from .utils import find_checkpoint

    try:
        config, preset = _configure(config, args)
        find_checkpoint(config.ckpt_path)
        prompts = check_prompts(_read_prompts(args) or getattr(preset, kind))
        negative = preset.negative_prompt if args.negative_prompt is None else args.negative_prompt
        check_prompts(negative, "--negative-prompt")
        if args.num_images < 1:
            raise ValueError(f"--num-images is {args.num_images}; expected at least 1")
        if not 0 <= args.seed < 2**63:
            raise ValueError(f"--seed is {args.seed}; expected at least 0 and less than 2**63")
        image = getattr(args, "image", None)
        if image is not None:
            load_image(image)
        output = prepare_output_folder(args.output)
    except (TypeError, ValueError, OSError) as error:
        message = str(error)
        for name, option in OPTIONS.items():
            message = message.replace(f"Config.{name}", option)
        raise UsageError(message) from error
    repeated = [prompt for prompt in prompts for _ in range(args.num_images)]
    return Job(kind, config, preset, repeated, negative, args.seed, image, output)


def _configure(config: Config, args: argparse.Namespace) -> tuple[Config, Preset]:
    """The settings with the command line's changes, and the preset that goes with the model."""
    from .utils import BOX, DOWNLOAD_COMMAND, model_in_the_box

    given = {name: getattr(args, name, None) for name in OPTIONS}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    released = config.ckpt_path == Config.ckpt_path
    if "ckpt_path" not in changes and released and not Path(config.ckpt_path).exists():
        changes["ckpt_path"] = model_in_the_box()
        print(
            f"The released weights are not in {config.ckpt_path} (to fetch them: "
            f"{DOWNLOAD_COMMAND}); using the small model in the box.",
            file=sys.stderr,
        )
    checkpoint = Path(changes.get("ckpt_path", config.ckpt_path))
    preset = SCENES if checkpoint.resolve() == BOX else PHOTOGRAPHS
    return replace(config, **(preset.config | changes)), preset


def _read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts of the command line or the file, none if neither is given."""
    if args.prompt_file is None:
        return args.prompt or []
    try:
        lines = args.prompt_file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{args.prompt_file} is no UTF-8 text; expected one prompt a line"
        ) from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{args.prompt_file} is empty; expected one prompt a line")
    return prompts


# From a job to pictures


def _run(job: Job, args: argparse.Namespace) -> None:
    from .images import image_grid, load_image, save_image
    from .utils import load_model

    if not sys.stderr.isatty():
        _hide_loading_bars()
    pipe = load_model(job.config, args.device, args.dtype)
    pipe.set_progress_bar_config(disable=None)  # None: shown on terminals only
    job = replace(job, config=_fit_size(job.config, pipe, args))
    if job.kind == "i2i" and job.image is None:
        job = replace(job, image=_first_picture(job, pipe))
    paths = _make(job, pipe)
    if args.grid:
        sheet = image_grid([load_image(path) for path in paths])
        print(save_image(sheet, _next_path(job.output, f"{job.kind}_grid")))


def _hide_loading_bars() -> None:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def _fit_size(config: Config, pipe: LocalDiTPipeline, args: argparse.Namespace) -> Config:
    """Make pictures of the model's own size where it isn't that of the model in the Config."""
    sample_size = pipe.transformer.config.sample_size
    if sample_size == config.sample_size:
        return config
    native = sample_size * pipe.vae_scale_factor
    return replace(config, height=args.height or native, width=args.width or native)


def _first_picture(job: Job, pipe: LocalDiTPipeline) -> Path:
    """The first picture that text to image saved; it is made if there is none."""
    saved = sorted(job.output.glob("t2i_[0-9]*.png"))
    if saved:
        return saved[0]
    print(f"There is no picture of infer_t2i.py in {job.output} yet; making one to start from.")
    return _make(replace(job, kind="t2i", prompts=job.preset.t2i[:1]), pipe)[0]


def _make(job: Job, pipe: LocalDiTPipeline) -> list[Path]:
    """Make the pictures of a job, and save each as soon as its batch is done."""
    from .images import save_image
    from .inference import inference_batches

    batches = inference_batches(
        pipe, job.prompts, job.negative_prompt, job.config, job.image, seed=job.seed
    )
    paths: list[Path] = []
    for batch in batches:
        for picture in batch:
            settings = _settings(job, pipe, len(paths))
            paths.append(save_image(picture, _next_path(job.output, job.kind), settings))
            print(f"{paths[-1]}: {settings['prompt']}", flush=True)
    return paths


def _settings(job: Job, pipe: LocalDiTPipeline, index: int) -> dict[str, Any]:
    """What made a picture, for the picture to carry."""
    config = job.config
    settings: dict[str, Any] = {
        "prompt": job.prompts[index],
        "negative_prompt": job.negative_prompt,
        "seed": job.seed + index,
        "steps": config.denoising_steps,
        "guidance_scale": config.guidance_scale,
        "height": config.height,
        "width": config.width,
        "model": "the model in the box" if job.preset is SCENES else str(config.ckpt_path),
        "dtype": str(pipe.transformer.dtype).removeprefix("torch."),
        "localdit": __version__,
    }
    if job.image is not None:
        settings |= {"image": str(job.image), "strength": config.denoising_strength}
    return settings


def _next_path(folder: Path, stem: str) -> Path:
    """The first `<stem>_<number>.png` after all that are there."""
    taken = [path.stem.removeprefix(f"{stem}_") for path in folder.glob(f"{stem}_[0-9]*.png")]
    number = max((int(text) for text in taken if text.isdecimal()), default=-1) + 1
    return folder / f"{stem}_{number:03d}.png"
