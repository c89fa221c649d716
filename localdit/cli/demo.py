"""`localdit demo`: serve a web page for generating pictures."""

from __future__ import annotations

import argparse
import errno
import importlib.util
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import with_settings
from ..core.samplers import config_of, suitable_samplers
from ..parsing import Parser, folder_argument, say
from . import arguments
from .arguments import usage_errors
from .drawing import load, picture_settings
from .output import Output
from .plan import SCENES, Choice, check_model, choose_model, fit_size, report_fallback

if TYPE_CHECKING:
    from PIL import Image

    from ..demo.artist import Settings
    from ..pipelines import LocalDiTPipeline

INSTALL = 'pip install "localdit[demo]"'
FIRST_PORT, PORTS = 7860, 100
STRENGTH = {"edit": 0.8, "inpaint": 1.0}


def build_parser() -> Parser:
    """Return the parser."""
    parser = Parser(
        prog="localdit demo",
        description="Serve a web page for generating, editing and inpainting pictures. One picture "
        "is generated at a time; further requests wait for their turn. Ctrl+C stops the server.",
        epilog="example: localdit demo --output pictures",
    )
    add = parser.add_argument_group("page").add_argument
    add("--host", default="127.0.0.1",
        help="address to listen on; 0.0.0.0 opens the page to the whole network (default: "
        "127.0.0.1, only this machine)")  # fmt: skip
    add("--port", metavar="N", type=int,
        help="port to listen on (default: the first free one from 7860)")  # fmt: skip
    add("-o", "--output", metavar="FOLDER", type=folder_argument,
        help="folder to keep the pictures in (default: they are deleted when the server "
        "stops)")  # fmt: skip
    arguments.add_model(parser)
    arguments.add_debug(parser)
    parser.set_defaults(run=demo)
    return parser


def demo(args: argparse.Namespace) -> None:
    """Load the model and serve the page until Ctrl+C, which is its normal end."""
    with usage_errors():
        if importlib.util.find_spec("gradio") is None:
            raise ImportError(f"the page needs Gradio: {INSTALL}")
    from ..images import prepare_output_folder

    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before Gradio is imported
    with tempfile.TemporaryDirectory(prefix="localdit-") as name:
        os.environ["GRADIO_TEMP_DIR"] = f"{name}/gradio"  # uploads are deleted with the rest
        with usage_errors():
            model = page_model(args)
            port = free_port(args.host, args.port)
            keep = None if args.output is None else prepare_output_folder(args.output)
        report_fallback(model)
        page = make_page(load(model), model, Path(name), keep)
        from ..demo.page import launch

        address = launch(page, args.host, port)
        say(f"LocalDiT is at {address} (Ctrl+C stops it)")
        try:
            wait_for_the_end()
        finally:
            page.close(verbose=False)


def page_model(args: argparse.Namespace) -> Choice:
    """Return the model of the page, in the size that the page first shows.

    In the box, that is the student, which draws while the visitor types; with LoRAs, its teacher.
    """
    model = check_model(choose_model(args, few_steps=not args.lora))
    size = fit_size(model.config)
    return replace(model, config=with_settings(model.config, size))


def make_page(pipe: LocalDiTPipeline, model: Choice, folder: Path, keep: Path | None = None) -> Any:
    """Return the page of a loaded model; its pictures go to `folder`, and also to `keep`."""
    from ..demo.artist import Artist
    from ..demo.controls import Offer
    from ..demo.page import build_page

    picture = scene() if model.preset is SCENES else None
    samplers = suitable_samplers(config_of(pipe.scheduler))
    offer = Offer(
        model.config, model.preset.t2i, STRENGTH, picture, pipe.pixels_per_token, samplers
    )
    save = saving(pipe, model, folder, keep)
    return build_page(Artist(pipe, model.config), offer, about(pipe, model), save)


def saving(
    pipe: LocalDiTPipeline, model: Choice, folder: Path, keep: Path | None
) -> Callable[[Image.Image, Settings], Path]:
    """Return a function that saves a picture with its settings and returns its path in `folder`.

    `folder` is created if it is missing. The path is never in `keep`: visitors of the page could
    then read the other files there.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def save(picture: Image.Image, settings: Settings) -> Path:
        config = settings.configure(model.config)
        carried = picture_settings(
            model, pipe, config, settings.prompt, settings.negative_prompt, settings.seed
        )
        carried["mode"] = settings.mode
        if settings.mode != "generate":
            carried["strength"] = settings.strength
        if keep is not None:
            Output(keep, settings.mode).save(picture, 0, carried)
        return Output(folder, settings.mode).save(picture, 0, carried)

    return save


def about(pipe: LocalDiTPipeline, model: Choice) -> list[str]:
    """Return the facts in the head of the page: the model, its size, the device and the dtype."""
    count = sum(parameter.numel() for parameter in pipe.transformer.parameters())
    name = model.name if model.boxed else Path(os.path.abspath(model.checkpoint)).name
    dtype = str(pipe.transformer.dtype).removeprefix("torch.")
    return [name, f"{count / 1e6:,.1f}M parameters", f"{pipe._execution_device} in {dtype}"]


def scene() -> Image.Image:
    """Return a picture of the kind that the model in the box draws."""
    from ..scenes import Scene, SceneObject, draw_scene
    from ..scenes.scene import Background

    circle = SceneObject("circle", "red", "large", 0.25, 0.25)
    return draw_scene(Scene(Background.plain("blue"), (circle,)))


def free_port(host: str, port: int | None) -> int:
    """Return `port` if it is free, or the first free one from `FIRST_PORT` if it is None."""
    try:
        family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
    except socket.gaierror as error:
        raise OSError(f"--host is {host!r}, which is not an address ({error.strerror})") from error
    for candidate in range(FIRST_PORT, FIRST_PORT + PORTS) if port is None else [port]:
        try:
            with socket.create_server((host, candidate), family=family):
                return candidate
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise OSError(
                    f"can't listen on --host {host}, port {candidate}: {error.strerror}"
                ) from error
    if port is None:
        raise OSError(
            f"all ports from {FIRST_PORT} to {FIRST_PORT + PORTS - 1} are taken; give --port"
        )
    raise OSError(
        f"port {port} is taken; give another --port, or leave it out to take the first free one"
    )


def wait_for_the_end() -> None:
    """Wait for Ctrl+C or a request to terminate."""
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    while not ended.wait(timeout=1):  # without a timeout, Windows would not see Ctrl+C
        pass
