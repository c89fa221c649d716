"""The page: what its controls do, and what it then shows."""

from __future__ import annotations

import html
import logging
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from ..errors import wording
from ..images import load_image, read_metadata
from ..sizes import proportional_size
from .artist import Artist, Step
from .controls import (
    Controls,
    Results,
    header,
    lay_out,
    note,
    problem,
    progress,
    settings_list,
)
from .settings import PAGE, Offer, Settings

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)

WAITING = 64  # drawings that can wait for their turn
HISTORY = 60  # pictures in a gallery
REUSED = (
    "prompt", "negative_prompt", "width", "height", "num_inference_steps", "guidance_scale", "seed",
    "strength",
)  # fmt: skip
NEW_SEEDS = 2**32  # number of different new seeds, which keeps them short

Updates = dict[Any, Any]  # new values of components
Save = Callable[["Image.Image", Settings], Path]


def build_page(
    artist: Artist,
    offer: Offer,
    about: list[str],
    save: Save,
) -> gr.Blocks:
    """Return the page, ready to launch.

    Args:
        artist: draws the pictures.
        offer: what the controls show at first, and their limits.
        about: facts about the model, for the head of the page.
        save: writes a picture to a PNG that carries its settings, and returns its path.
    """
    page = gr.Blocks(
        title="LocalDiT",
        analytics_enabled=False,
        fill_width=True,
        delete_cache=(3600, 24 * 3600),  # checked every hour, kept for a day
    )
    with page:
        gr.HTML(header(about))
        controls, results = lay_out(offer)
        Desk(artist, offer, controls, results, save).wire()
    page.queue(max_size=WAITING)
    return page


class Desk:
    """What the controls do. It has no state: the pictures of visitors are in their sessions."""

    def __init__(
        self,
        artist: Artist,
        offer: Offer,
        controls: Controls,
        results: Results,
        save: Save,
    ) -> None:
        self.artist = artist
        self.offer = offer
        self.controls = controls
        self.results = results
        self.save = save

    def wire(self) -> None:
        """Connect the controls; call this within the page."""
        controls, results = self.controls, self.results
        at_once: dict[str, Any] = {"queue": False, "show_progress": "hidden"}
        at_once["api_visibility"] = "private"
        buttons = [controls.draw, controls.stop, results.status]
        asked = gr.on(
            [controls.draw.click, controls.prompt.submit], self.begin, None, buttons, **at_once
        )
        drawing = asked.then(
            self.draw,
            [*controls.settings, results.history],
            [*results.of_a_picture, results.gallery, results.history, controls.seed],
            show_progress="hidden",
            concurrency_limit=1,
            api_name="draw",
        )
        drawing.success(self.end, None, buttons[:2], **at_once)
        drawing.failure(self.end, None, buttons[:2], **at_once)
        controls.stop.click(self.stop, None, buttons, cancels=[drawing], **at_once)
        results.gallery.select(self.select, results.history, results.of_a_picture, **at_once)
        controls.mode.input(self.switch, controls.mode, controls.of_a_mode, **at_once)
        shown = results.shown
        results.edit.click(self.edit_this, shown, controls.of_a_mode, **at_once)
        results.inpaint.click(self.inpaint_this, shown, controls.of_a_mode, **at_once)
        results.reuse.click(self.reuse, shown, [controls.source, *controls.settings], **at_once)
        size = [controls.height, controls.width]
        controls.image.upload(self.put_in, controls.image, size, **at_once)
        controls.editor.upload(self.put_into_editor, controls.editor, size, **at_once)

    # Drawing

    def begin(self) -> Updates:
        """Show that a picture waits for its turn."""
        return {
            self.controls.draw: gr.update(interactive=False),
            self.controls.stop: gr.update(visible=True),
            self.results.status: note("Waiting for its turn …"),
        }

    def draw(
        self,
        mode: Any,
        prompt: str,
        image: str | None,
        painted: dict[str, Any] | None,
        strength: float,
        negative_prompt: str,
        width: int,
        height: int,
        steps: int,
        guidance_scale: float,
        seed: int,
        random_seed: bool,
        history: list[str],
    ) -> Iterator[Updates]:
        """Draw a picture with previews; the names of the arguments are those of the page's API.

        Raises:
            gr.Error: the picture can't be drawn; the message is for the page.
        """
        settings = Settings(
            mode=mode,
            prompt=prompt,
            negative_prompt=negative_prompt,
            seed=secrets.randbelow(NEW_SEEDS) if random_seed else seed,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            height=height,
            width=width,
            strength=strength,
        )
        yield {self.results.status: note("Starting …")}
        try:
            with _page_errors():
                for event in self.artist.draw(settings, *_pictures(mode, image, painted)):
                    if isinstance(event, Step):
                        yield self._while_drawing(event)
                    else:
                        yield self._drawn(self.save(event, settings), settings, history)
        except gr.Error as error:
            yield {self.results.status: problem(html.unescape(error.message))}
            raise

    def end(self) -> Updates:
        """Show that the drawing has ended."""
        return {
            self.controls.draw: gr.update(interactive=True),
            self.controls.stop: gr.update(visible=False),
        }

    def stop(self) -> Updates:
        """Show that the drawing was stopped; Gradio closes the iterator of `draw`."""
        return self.end() | {
            self.results.status: note("Stopped. The unfinished picture is not kept.")
        }

    def _while_drawing(self, step: Step) -> Updates:
        shown = {self.results.picture: step.preview} if step.preview else {}
        return shown | {self.results.status: progress(step.number, step.total)}

    def _drawn(self, path: Path, settings: Settings, history: list[str]) -> Updates:
        history = [str(path), *history][:HISTORY]
        return self._show(history[0]) | {
            self.results.gallery: gr.update(
                value=_captioned(history), selected_index=0, visible=True
            ),
            self.results.history: history,
            self.controls.seed: settings.seed,
        }

    # Pictures that were drawn

    def select(self, event: gr.SelectData, history: list[str]) -> Updates:
        """Show the picture of the gallery that was clicked."""
        return self._show(history[event.index])

    def _show(self, path: str) -> Updates:
        results = self.results
        buttons = dict.fromkeys(results.actions, gr.update(interactive=True))
        return buttons | {
            results.picture: path,
            results.shown: path,
            results.status: settings_list(read_metadata(path)),
        }

    def edit_this(self, path: str) -> Updates:
        """Edit the visible picture."""
        put_in = {self.controls.image: gr.update(value=path, visible=True)}
        return self.switch("edit") | put_in | self.fit_to(path)

    def inpaint_this(self, path: str) -> Updates:
        """Inpaint the visible picture."""
        put_in = {self.controls.editor: gr.update(value=path, visible=True)}
        return self.switch("inpaint") | put_in | self.fit_to(path)

    def reuse(self, path: str) -> Updates:
        """Set the controls to the settings of the visible picture."""
        controls, settings = self.controls, read_metadata(path)
        if "steps" in settings:  # the name in pictures of earlier versions
            settings["num_inference_steps"] = settings.pop("steps")
        values = {getattr(controls, name): settings[name] for name in REUSED if name in settings}
        return self.switch(settings["mode"]) | values | {controls.random_seed: False}

    # Pictures to start from

    def switch(self, mode: str) -> Updates:
        """Show the controls of a mode."""
        controls = self.controls
        return {
            controls.mode: mode,
            controls.source: gr.update(visible=mode != "generate"),
            controls.image: gr.update(visible=mode == "edit"),
            controls.editor: gr.update(visible=mode == "inpaint"),
            controls.strength: self.offer.strength.get(mode, 1.0),
        }

    def fit_to(self, picture: str | Image.Image) -> Updates:
        """Choose a size with the proportions of a picture and as many pixels as at first."""
        first, (_, longest, multiple) = self.offer.config, self.offer.sides
        with _page_errors():
            size = _picture(picture).size
        height, width = proportional_size(size, first.height * first.width, multiple)
        return {
            self.controls.height: min(height, longest),
            self.controls.width: min(width, longest),
        }

    def put_in(self, image: str | None) -> Updates:
        """Fit the size to an uploaded picture."""
        return self.fit_to(image) if image else {}

    def put_into_editor(self, painted: dict[str, Any] | None) -> Updates:
        """Fit the size to a picture that was uploaded into the editor."""
        background = (painted or {}).get("background")
        return self.fit_to(background) if background else {}


def _pictures(
    mode: str, image: str | None, painted: dict[str, Any] | None
) -> tuple[Image.Image | None, Image.Image | None]:
    """Return the picture to start from and the mask, each None if it is missing."""
    if mode == "edit" and image:
        return _picture(image), None
    if mode == "inpaint" and painted:
        return painted["background"], _mask(painted["layers"])
    return None, None


def _mask(layers: list[Image.Image]) -> Image.Image | None:
    """Return a mask that is white where any of the layers is painted."""
    from PIL import ImageChops

    mask = None
    for layer in layers:
        painted = layer.getchannel("A").point(lambda alpha: 255 * (alpha > 0))
        mask = painted if mask is None else ImageChops.lighter(mask, painted)
    return mask


def _captioned(paths: list[str]) -> list[tuple[str, str]]:
    """Return each picture with its prompt, which serves as its description."""
    return [(path, read_metadata(path)["prompt"]) for path in paths]


def _picture(source: str | Image.Image) -> Image.Image:
    """Read a picture; errors have the name of its file, but not the server's folder.

    Raises:
        ValueError: it is not a picture.
    """
    return load_image(source, Path(source).name if isinstance(source, str) else None)


@contextmanager
def _page_errors() -> Iterator[None]:
    """Turn errors into messages of the page.

    Raises:
        gr.Error: with the message.
    """
    try:
        yield
    except ValueError as error:
        raise _error(wording(error, PAGE)) from error
    except Exception as error:
        logger.exception("Something in the page failed")
        raise _error(f"{type(error).__name__}: {error} (the terminal has more)") from error


def _error(message: str) -> gr.Error:
    return gr.Error(html.escape(message, quote=False), print_exception=False)
