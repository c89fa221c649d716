"""From the command line to a page that is served."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
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

    with pictures_folder(args.output) as folder:
        job = plan(
            argparse.Namespace(**WITHOUT | vars(args) | {"output": folder}),
            "demo",
            own_prompts=lambda preset: preset.t2i,
        )
        try:
            port = free_port(args.host, args.port)
        except OSError as error:
            raise UsageError(str(error)) from error
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before Gradio is imported
        page = open_page(load(job), job, folder)
        address = launch(page, args.host, port, folder)
        print(f"LocalDiT is at {address} (Ctrl+C ends it)", flush=True)
        try:
            wait_for_the_end()
        finally:
            page.close(verbose=False)


def open_page(pipe: LocalDiTPipeline, job: Job, folder: Path) -> Any:
    """The page of a loaded model, with what suits it."""
    from .drawing import Artist
    from .page import build_page

    config = fit_size(job, pipe)

    def save(picture: Image.Image, settings: Settings) -> Path:
        drawn = settings.configure(config)
        carried = picture_settings(
            drawn, job.preset, pipe, settings.prompt, settings.negative_prompt, settings.seed
        )
        carried["mode"] = settings.mode
        if settings.mode != "generate":
            carried["strength"] = settings.strength
        return Output(folder, settings.mode).save(picture, 0, carried)

    boxed = job.preset is SCENES
    offer = Offer(config, job.negative_prompt, job.prompts, STRENGTH, scene() if boxed else None)
    return build_page(Artist(pipe, config), offer, about(pipe, job), save)


@contextmanager
def pictures_folder(given: Path | None) -> Iterator[Path]:
    """The folder given, or one that is there for as long as the page.

    Raises:
        UsageError: if it can't be written to.
    """
    if given is None:
        with tempfile.TemporaryDirectory(prefix="localdit-") as name:
            yield Path(name)
        return
    try:
        folder = prepare_output_folder(given)
    except OSError as error:
        raise UsageError(str(error)) from error
    yield folder


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
