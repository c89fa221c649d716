"""The page: what happens when something is pressed, and what shows then."""

from __future__ import annotations

import html
import logging
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from ..commands.drawing import proportional_size
from ..images import load_image, read_metadata
from .drawing import Artist, Step
from .layout import Controls, Results, lay_out
from .settings import Offer, Settings
from .words import header, note, problem, progress, settings_list

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)

WAITING = 64  # drawings that may wait for their turn
HISTORY = 60  # pictures in a gallery
NEW_SEEDS = 2**32  # as many are drawn from; they stay short

Updates = dict[Any, Any]  # of components
Save = Callable[["Image.Image", Settings], Path]


def build_page(
    artist: Artist,
    offer: Offer,
    about: list[str],
    save: Save,
) -> gr.Blocks:
    """Build the page, to be launched.

    Args:
        artist: draws.
        offer: what the controls show at first, and their limits.
        about: what the model is called, where it computes, and the like.
        save: writes a picture to a PNG that carries its settings, and says where it is.
    """
    page = gr.Blocks(
        title="LocalDiT",
        analytics_enabled=False,
        fill_width=True,
        delete_cache=(3600, 24 * 3600),  # looked at every hour, kept for a day
    )
    with page:
        gr.HTML(header(about))
        controls, results = lay_out(offer)
        Desk(artist, offer, controls, results, save).wire()
    page.queue(max_size=WAITING)
    return page


class Desk:
    """What the controls do. It keeps nothing: what a visitor has drawn is in their session."""

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
        """Connect the controls; to be called within the page."""
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
        """A picture is asked for; its turn may come later."""
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
        """Draw a picture as the controls say, with previews.

        Raises:
            gr.Error: with a message for the page.
        """
        settings = Settings(
            mode=mode,
            prompt=prompt,
            negative_prompt=negative_prompt,
            seed=secrets.randbelow(NEW_SEEDS) if random_seed else seed,
            steps=steps,
            guidance_scale=guidance_scale,
            height=height,
            width=width,
            strength=strength,
        )
        yield {self.results.status: note("Starting …")}
        try:
            with _told():
                for event in self.artist.draw(settings, *_pictures(mode, image, painted)):
                    if isinstance(event, Step):
                        yield self._while_drawing(event)
                    else:
                        yield self._drawn(self.save(event, settings), settings, history)
        except gr.Error as error:
            yield {self.results.status: problem(html.unescape(error.message))}
            raise

    def end(self) -> Updates:
        """Nothing is being drawn any more."""
        return {
            self.controls.draw: gr.update(interactive=True),
            self.controls.stop: gr.update(visible=False),
        }

    def stop(self) -> Updates:
        """The drawing was stopped; Gradio closes the iterator of `draw` meanwhile."""
        return self.end() | {self.results.status: note("Stopped. What was begun is not kept.")}

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
        """A picture of the gallery was pressed."""
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
        """Start from the picture that is shown."""
        put_in = {self.controls.image: gr.update(value=path, visible=True)}
        return self.switch("edit") | put_in | self.fit_to(path)

    def inpaint_this(self, path: str) -> Updates:
        """Paint in the picture that is shown."""
        put_in = {self.controls.editor: gr.update(value=path, visible=True)}
        return self.switch("inpaint") | put_in | self.fit_to(path)

    def reuse(self, path: str) -> Updates:
        """Set the controls as they were for the picture that is shown."""
        controls, settings = self.controls, read_metadata(path)
        names = ("prompt", "negative_prompt", "width", "height", "steps", "guidance_scale", "seed")
        values = {getattr(controls, name): settings[name] for name in names}
        if "strength" in settings:
            values[controls.strength] = settings["strength"]
        return self.switch(settings["mode"]) | values | {controls.random_seed: False}

    # What to start from

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
        """Choose a size with the proportions of a picture, of as many pixels as at first."""
        first, (_, longest, _) = self.offer.config, self.offer.sides
        with _told():
            size = _picture(picture).size
        height, width = proportional_size(size, first.height * first.width)
        return {
            self.controls.height: min(height, longest),
            self.controls.width: min(width, longest),
        }

    def put_in(self, image: str | None) -> Updates:
        """A picture to edit was put in."""
        return self.fit_to(image) if image else {}

    def put_into_editor(self, painted: dict[str, Any] | None) -> Updates:
        """A picture to inpaint was put in."""
        background = (painted or {}).get("background")
        return self.fit_to(background) if background else {}


def _pictures(
    mode: str, image: str | None, painted: dict[str, Any] | None
) -> tuple[Image.Image | None, Image.Image | None]:
    """The picture to start from, and the mask, as far as they are there."""
    if mode == "edit" and image:
        return _picture(image), None
    if mode == "inpaint" and painted:
        return painted["background"], _mask(painted["layers"])
    return None, None


def _mask(layers: list[Image.Image]) -> Image.Image | None:
    """White where something was painted on any of the layers."""
    from PIL import ImageChops

    mask = None
    for layer in layers:
        painted = layer.getchannel("A").point(lambda alpha: 255 * (alpha > 0))
        mask = painted if mask is None else ImageChops.lighter(mask, painted)
    return mask


def _captioned(paths: list[str]) -> list[tuple[str, str]]:
    """Each picture with its prompt, which stands for it where pictures can't be seen."""
    return [(path, read_metadata(path)["prompt"]) for path in paths]


def _picture(source: str | Image.Image) -> Image.Image:
    """Read a picture.

    Raises:
        ValueError: if it is none; the message has the file's name, and not where the server put it.
    """
    try:
        return load_image(source)
    except ValueError as error:
        raise ValueError(str(error).replace(str(source), Path(str(source)).name)) from error


@contextmanager
def _told() -> Iterator[None]:
    """What goes wrong is told in the page.

    Raises:
        gr.Error: with a message for whoever sits before it.
    """
    try:
        yield
    except ValueError as error:
        raise _error(str(error)) from error
    except Exception as error:
        logger.exception("Something in the page failed")
        raise _error(f"{type(error).__name__}: {error} (the terminal has more)") from error


def _error(message: str) -> gr.Error:
    return gr.Error(html.escape(message, quote=False), print_exception=False)
