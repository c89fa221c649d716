"""`localdit generate`, `edit` and `inpaint`, and the scripts `infer_t2i.py` and `infer_i2i.py`."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import Config, inference_settings
from ..parsing import Parser, one_line, path_argument, run, say
from ..version import __version__
from . import arguments
from .arguments import COMMAND_LINE
from .output import Output
from .plan import Choice, Job, Task, plan

if TYPE_CHECKING:
    from ..pipelines import LocalDiTPipeline

CARRIES = "Every PNG stores the settings that generated it."
LIKE_THE_PICTURE = "the picture's proportions, with as many pixels as the model's own size"
DRAWN = ("num_inference_steps", "guidance_scale", "height", "width")


# The commands


def generate_parser() -> Parser:
    """Return the parser of `localdit generate`."""
    parser = _parser("generate", "PROMPT ...", f"Generate pictures from prompts. {CARRIES}",
        '"a large red circle at the top left on blue" -o circle.png')  # fmt: skip
    arguments.add_prompts(parser)
    arguments.add_drawing(parser, size="the model's own size")
    return parser


def edit_parser() -> Parser:
    """Return the parser of `localdit edit`."""
    parser = _parser("edit", "PICTURE PROMPT ...",
        f"Change a picture to follow a prompt. {CARRIES}",
        'circle.png "a large green circle at the top left on yellow" --strength 0.7')  # fmt: skip
    parser.add_argument("image", metavar="PICTURE", type=path_argument,
        help="the picture to start from")  # fmt: skip
    arguments.add_prompts(parser)
    arguments.add_strength(parser)
    arguments.add_drawing(parser, size=LIKE_THE_PICTURE)
    return parser


def inpaint_parser() -> Parser:
    """Return the parser of `localdit inpaint`."""
    parser = _parser("inpaint", "PICTURE MASK PROMPT ...",
        "Repaint the parts of a picture where a mask is white, to follow a prompt. The picture "
        "keeps its size, and its pixels where the mask is black.",
        'street.png mask.png "a street with a red car"')  # fmt: skip
    add = parser.add_argument
    add("image", metavar="PICTURE", type=path_argument, help="the picture to repaint")
    add("mask", metavar="MASK", type=path_argument,
        help="a picture of the same size: white is repainted, black is kept")  # fmt: skip
    arguments.add_prompts(parser)
    arguments.add_strength(parser, default=1.0)
    add("--padding-mask-crop", metavar="PIXELS", type=int,
        help="repaint only the area of the mask and this many pixels around it, in full detail "
        "(default: the whole picture)")  # fmt: skip
    arguments.add_drawing(parser, size=LIKE_THE_PICTURE)
    return parser


def _parser(command: str, operands: str, description: str, example: str) -> Parser:
    """Return the parser of a command that draws, still without arguments."""
    parser = Parser(
        prog=f"localdit {command}",
        usage=f"%(prog)s {operands} [options]",
        description=description,
        epilog=f"example: localdit {command} {example}",
    )
    parser.set_defaults(run=generate, stem=command)
    return parser


def generate(args: argparse.Namespace) -> None:
    """Draw the pictures of `localdit generate`, `edit` or `inpaint`."""
    job = plan(args, args.stem)
    draw(job, load(job.model))


# The scripts


def script_parser(task: Task) -> Parser:
    """Return the parser of `infer_t2i.py` ("t2i") or `infer_i2i.py` ("i2i")."""
    generating = "Generate pictures from prompts"
    doing = generating if task == "t2i" else "Change a picture to follow prompts"
    parser = Parser(
        description=f"{doing} with LocalDiT. Without options, default prompts are used.",
        epilog="Settings without an option come from config.py, or from the model's folder. "
        + CARRIES,
    )
    arguments.add_prompt_options(parser)
    if task == "i2i":
        parser.add_argument("--image", type=path_argument,
            help="the picture to start from (default: the first one of infer_t2i.py)")  # fmt: skip
        arguments.add_strength(parser)
    arguments.add_drawing(parser, size="that of config.py, or the model's own size")
    return parser


def run_script(task: Task, config: Config, argv: Sequence[str] | None = None) -> int:
    """Run one of the scripts and return its exit status.

    Pictures are saved as soon as they are drawn, as `output/t2i_000.png`, `output/t2i_001.png` and
    so on. Numbers continue, and no picture is ever overwritten.

    Args:
        task: "t2i" or "i2i".
        config: the settings that the command line does not change.
        argv: the arguments, by default those of the process.
    """

    def work(args: argparse.Namespace) -> None:
        job = plan(args, task, config=config, task=task)
        pipe = load(job.model)
        if task == "i2i" and job.image is None:
            job = replace(job, image=_first_picture(job, pipe))
        draw(job, pipe)

    return run(script_parser(task), argv, work, COMMAND_LINE)


def _first_picture(job: Job, pipe: LocalDiTPipeline) -> Path:
    """Return the first picture that `infer_t2i.py` saved, or draw one."""
    folder = job.output.folder
    saved = sorted(folder.glob("t2i_[0-9]*.png"))
    if saved:
        return saved[0]
    say(f"{folder} has no picture of infer_t2i.py yet; drawing one to start from.")
    prompts = job.model.preset.t2i[:1]
    return draw(replace(job, prompts=prompts, output=Output(folder, "t2i"), grid=False), pipe)[0]


# Drawing


def load(model: Choice) -> LocalDiTPipeline:
    """Load a model and its LoRAs."""
    from ..machine import hide_loading_bars
    from ..utils import load_model

    hide_loading_bars()
    pipe = load_model(model.config, model.device, model.dtype)
    pipe.set_progress_bar_config(disable=None)  # shown on terminals only
    names = [f"lora_{number}" for number in range(len(model.loras))]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several are intended
        for path, name in zip(model.loras, names, strict=True):
            pipe.load_lora_weights(path, adapter_name=name)
    if names:
        pipe.set_adapters(names, list(model.loras.values()))
    return pipe


def draw(job: Job, pipe: LocalDiTPipeline) -> list[Path]:
    """Draw a job's pictures, save each when its batch is done, and return the paths."""
    from ..images import image_grid, load_image
    from ..inference import inference_batches

    batches = inference_batches(
        pipe,
        job.prompts,
        job.negative_prompt,
        job.model.config,
        job.image,
        mask=job.mask,
        padding_mask_crop=_padding(job),
        seed=job.seed,
    )
    paths: list[Path] = []
    for batch in batches:
        for picture in batch:
            settings = _settings(job, pipe, len(paths))
            paths.append(job.output.save(picture, len(paths), settings))
            say(one_line(f"{paths[-1]}: {settings['prompt']}"))
    if job.grid:
        sheet = job.output.save_grid(image_grid([load_image(path) for path in paths]))
        say(one_line(str(sheet)))
    return paths


def _padding(job: Job) -> int | None:
    """Return the pixels around the mask to draw; None draws a picture of the drawn size whole.

    A picture of another size is scaled and put back, so that it keeps its size: by default with
    everything around the mask.
    """
    from ..images import load_image

    if job.mask is None or job.padding_mask_crop is not None:
        return job.padding_mask_crop
    assert job.image is not None
    width, height = load_image(job.image).size
    drawn = job.model.config.height, job.model.config.width
    return None if (height, width) == drawn else max(width, height)


def _settings(job: Job, pipe: LocalDiTPipeline, index: int) -> dict[str, Any]:
    """Return the settings that the `index`-th picture of a job carries."""
    config, seed = job.model.config, job.seed + index
    settings = picture_settings(
        job.model, pipe, config, job.prompts[index], job.negative_prompt, seed
    )
    if job.image is not None:
        strength = inference_settings(config)["strength"]
        settings |= {"image": str(job.image), "strength": strength}
    if job.mask is not None:
        settings |= {"mask": str(job.mask), "padding_mask_crop": job.padding_mask_crop}
    return settings


def picture_settings(
    model: Choice,
    pipe: LocalDiTPipeline,
    config: Config,
    prompt: str,
    negative_prompt: str,
    seed: int,
) -> dict[str, Any]:
    """Return the settings that a picture from text carries."""
    drawn = inference_settings(config)
    settings: dict[str, Any] = {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "seed": seed,
        **{name: drawn[name] for name in DRAWN},
        **({"sampler": config.sampler} if config.sampler else {}),
        "model": model.name,
        **model.changes,
        "dtype": str(pipe.transformer.dtype).removeprefix("torch."),
        "localdit": __version__,
    }
    return settings | ({"loras": model.loras} if model.loras else {})
