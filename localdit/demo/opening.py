"""From the command line to a page that is served."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..commands.drawing import fit_size, load, picture_settings
from ..commands.job import Job, plan
from ..commands.parsing import UsageError
from ..commands.presets import SCENES
from ..commands.saving import Output
from ..images import prepare_output_folder
from .settings import Offer, Settings

if TYPE_CHECKING:
    from PIL import Image

    from ..config import Config
    from ..pipelines import LocalDiTPipeline

# What the commands that draw have beside the options of this one.
WITHOUT = {
    "prompt": None, "prompt_file": None, "negative_prompt": None, "seed": 0, "num_images": 1,
    "height": None, "width": None, "grid": False, "overwrite": False,
}  # fmt: skip
STRENGTH = {"edit": 0.8, "inpaint": 1.0}


def serve(args: argparse.Namespace) -> None:
    """Load the model and serve the page until it is interrupted.

    Raises:
        UsageError: for a mistake in the command.
        Exception: whatever prevents the model from being loaded.
    """
    from .serving import free_port, launch, wait_for_the_end

    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before Gradio is imported
    with tempfile.TemporaryDirectory(prefix="localdit-") as name:
        os.environ["GRADIO_TEMP_DIR"] = f"{name}/gradio"  # what is put in goes with the rest
        job = planned(args, Path(name))
        try:
            port = free_port(args.host, args.port)
            keep = None if args.output is None else prepare_output_folder(args.output)
        except OSError as error:
            raise UsageError(str(error)) from error
        page = open_page(load(job), job, keep)
        address = launch(page, args.host, port)
        print(f"LocalDiT is at {address} (Ctrl+C ends it)", flush=True)
        try:
            wait_for_the_end()
        finally:
            page.close(verbose=False)


def planned(args: argparse.Namespace, folder: Path) -> Job:
    """What the page begins with, as the job of a command that draws into a folder.

    Raises:
        UsageError: if it can't be done.
    """
    given = argparse.Namespace(**WITHOUT | vars(args) | {"output": folder})
    return plan(given, "demo", own_prompts=lambda preset: preset.t2i)


def open_page(pipe: LocalDiTPipeline, job: Job, keep: Path | None = None) -> Any:
    """The page of a loaded model, with what suits it.

    Args:
        pipe: the model.
        job: from `planned`.
        keep: where pictures stay; without it they go with the job's folder.
    """
    from .drawing import Artist
    from .page import build_page

    config = fit_size(job, pipe)
    picture = scene() if job.preset is SCENES else None
    offer = Offer(config, job.negative_prompt, job.prompts, STRENGTH, picture)
    save = saving(pipe, job, config, keep)
    return build_page(Artist(pipe, config), offer, about(pipe, job), save)


def saving(
    pipe: LocalDiTPipeline, job: Job, config: Config, keep: Path | None
) -> Callable[[Image.Image, Settings], Path]:
    """What saves a picture with its settings, and says where the page finds it.

    That is never in `keep`: who can reach the page could then read what else is in there.
    """

    def save(picture: Image.Image, settings: Settings) -> Path:
        asked = replace(
            job, config=settings.configure(config), negative_prompt=settings.negative_prompt
        )
        carried = picture_settings(asked, pipe, settings.prompt, settings.seed)
        carried["mode"] = settings.mode
        if settings.mode != "generate":
            carried["strength"] = settings.strength
        if keep is not None:
            Output(keep, settings.mode).save(picture, 0, carried)
        return Output(job.output.folder, settings.mode).save(picture, 0, carried)

    return save


def about(pipe: LocalDiTPipeline, job: Job) -> list[str]:
    """What draws, for the head of the page."""
    count = sum(parameter.numel() for parameter in pipe.transformer.parameters())
    name = "the model in the box" if job.preset is SCENES else str(Path(job.config.ckpt_path).name)
    dtype = str(pipe.transformer.dtype).removeprefix("torch.")
    return [name, f"{count / 1e6:,.1f}M parameters", f"{pipe._execution_device} in {dtype}"]


def scene() -> Image.Image:
    """A picture of the kind that the model in the box knows."""
    from ..scenes import Scene, SceneObject, draw_scene

    return draw_scene(Scene("blue", (SceneObject("circle", "red", "large", 0.25, 0.25),)))
