"""From a job to pictures."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..config import PIXEL_MULTIPLE, Config
from . import options
from .job import Job, plan
from .parsing import Parser, run
from .presets import SCENES

if TYPE_CHECKING:
    from ..pipelines import LocalDiTPipeline


def run_drawing(parser: Parser, argv: Sequence[str] | None, command: str) -> int:
    """Run a command that draws; returns the exit status.

    Args:
        parser: its arguments, those of `options.add_drawing` among them.
        argv: the arguments, by default those of the process.
        command: its name, which the pictures' files get.
    """
    return run(parser, argv, lambda args: draw(plan(args, command)), options.CALLED)


def draw(
    job: Job, complete: Callable[[Job, LocalDiTPipeline], Job] = lambda job, _: job
) -> list[Path]:
    """Load the model, make the pictures and save each as soon as its batch is done.

    Args:
        job: what to draw.
        complete: settles what takes the loaded model to know.

    Returns:
        The pictures' files, the sheet apart.
    """
    from ..images import image_grid, load_image

    pipe = load(job)
    job = complete(job, pipe)
    paths = make(replace(job, config=fit_size(job, pipe)), pipe)
    if job.grid:
        print(job.output.save_grid(image_grid([load_image(path) for path in paths])))
    return paths


def load(job: Job) -> LocalDiTPipeline:
    """The pipeline of a job; bars are shown on terminals only."""
    from ..progress import hidden, hide_loading_bars
    from ..utils import load_model

    hide_loading_bars()
    pipe = load_model(job.config, job.device, job.dtype)
    pipe.set_progress_bar_config(disable=hidden())
    _load_loras(job, pipe)
    return pipe


def _load_loras(job: Job, pipe: LocalDiTPipeline) -> None:
    names = [f"lora_{number}" for number in range(len(job.loras))]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several are meant
        for path, name in zip(job.loras, names, strict=True):
            pipe.load_lora_weights(path, adapter_name=name)
    if names:
        pipe.set_adapters(names, list(job.loras.values()))


def make(job: Job, pipe: LocalDiTPipeline) -> list[Path]:
    """Make the pictures of a job, and save each as soon as its batch is done."""
    from ..inference import inference_batches

    batches = inference_batches(
        pipe,
        job.prompts,
        job.negative_prompt,
        job.config,
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
            print(f"{paths[-1]}: {settings['prompt']}", flush=True)
    return paths


def fit_size(job: Job, pipe: LocalDiTPipeline) -> Config:
    """The job's settings with the size that its pictures are drawn in.

    Without a size in the command it is the Config's, if that describes the model, else the model's
    own square; and of a picture that keeps its proportions, as many pixels.
    """
    from ..images import load_image

    config, (height, width) = job.config, job.size
    sample_size = pipe.transformer.config.sample_size
    if job.keeps_proportions:
        assert job.image is not None
        side = sample_size * pipe.vae_scale_factor
        described = sample_size == config.sample_size
        pixels = config.height * config.width if described and job.size == (None, None) else side**2
        height, width = proportional_size(load_image(job.image).size, pixels, height, width)
    elif sample_size != config.sample_size:
        native = sample_size * pipe.vae_scale_factor
        height, width = height or native, width or native
    return replace(config, height=height or config.height, width=width or config.width)


def proportional_size(
    size: tuple[int, int], pixels: int, height: int | None = None, width: int | None = None
) -> tuple[int, int]:
    """Height and width with the proportions of a picture, multiples of 16.

    Args:
        size: (width, height) of the picture.
        pixels: how many there are to be in all, about, where neither height nor width is given.
    """
    ratio = size[0] / size[1]

    def near(side: float) -> int:
        return max(PIXEL_MULTIPLE, PIXEL_MULTIPLE * round(side / PIXEL_MULTIPLE))

    if height and not width:
        width = near(height * ratio)
    elif width and not height:
        height = near(width / ratio)
    return height or near(math.sqrt(pixels / ratio)), width or near(math.sqrt(pixels * ratio))


def _padding(job: Job) -> int | None:
    """How much around the mask is worked on; None if the picture is of the size that is drawn.

    Others are scaled and put back, so that they keep their size: with all that is around the mask,
    unless told otherwise.
    """
    from ..images import load_image

    if job.mask is None or job.padding_mask_crop is not None:
        return job.padding_mask_crop
    assert job.image is not None
    width, height = load_image(job.image).size
    return None if (height, width) == (job.config.height, job.config.width) else max(width, height)


def picture_settings(job: Job, pipe: LocalDiTPipeline, prompt: str, seed: int) -> dict[str, Any]:
    """What made a picture of a job from text, for the picture to carry."""
    config = job.config
    settings: dict[str, Any] = {
        "prompt": prompt,
        "negative_prompt": job.negative_prompt,
        "seed": seed,
        "steps": config.denoising_steps,
        "guidance_scale": config.guidance_scale,
        "height": config.height,
        "width": config.width,
        "model": "the model in the box" if job.preset is SCENES else str(config.ckpt_path),
        "dtype": str(pipe.transformer.dtype).removeprefix("torch."),
        "localdit": __version__,
    }
    return settings | ({"loras": job.loras} if job.loras else {})


def _settings(job: Job, pipe: LocalDiTPipeline, index: int) -> dict[str, Any]:
    settings = picture_settings(job, pipe, job.prompts[index], job.seed + index)
    if job.image is not None:
        settings |= {"image": str(job.image), "strength": job.config.denoising_strength}
    if job.mask is not None:
        settings |= {"mask": str(job.mask), "padding_mask_crop": job.padding_mask_crop}
    return settings
