"""The page: what its controls do, what it then shows, and its server."""

from __future__ import annotations

import html
import logging
import secrets
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image, ImageChops
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

from ..errors import wording
from ..images import load_image, load_layer, read_metadata
from ..sizes import proportional_size
from .artist import PAGE, Artist, Settings, Step
from .controls import MOST_LAYERS, Controls, Offer, header, note, problem, progress, settings_list

logger = logging.getLogger(__name__)

WAITING = 64  # drawings that can wait for their turn
HISTORY = 60  # pictures in a gallery
REUSED = (
    "prompt", "negative_prompt", "width", "height", "num_inference_steps", "guidance_scale", "seed",
    "strength", "sampler",
)  # fmt: skip
NEW_SEEDS = 2**32  # number of different new seeds, which keeps them short

STYLE = Path(__file__).with_name("style.css")
# Browsers then fetch nothing from other servers, even if Gradio's page asks for it.
POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"
# Addresses of Gradio's that fetch from other servers, or start a program for what was uploaded.
CLOSED = ("/file=http", "/proxy=", "/process_recording", "/run-history/")
MOST_BYTES = 80 * 2**20  # of a request: a file of the largest size, and some more
UNREADABLE = (
    "The request does not fit this page. Send the values that /gradio_api/info lists, and upload "
    "pictures to this page first."
)

SKETCHED = "Drawn while you type. Press Draw to keep it."

Updates = dict[Any, Any]  # new values of components
Save = Callable[[Image.Image, Settings], Path]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


def build_page(artist: Artist, offer: Offer, about: list[str], save: Save) -> gr.Blocks:
    """Return the page, ready to launch.

    Args:
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
        desk = Desk(artist, offer, Controls(offer), save)
        desk.wire()
    guard(page, Path(desk.controls.image.GRADIO_CACHE))
    page.queue(max_size=WAITING)
    return page


@dataclass(eq=False)
class Desk:
    """What the controls do. It has no state: the pictures of visitors are in their sessions."""

    artist: Artist
    offer: Offer
    controls: Controls
    save: Save

    def wire(self) -> None:
        """Connect the controls; call this within the page."""
        page = self.controls
        at_once: dict[str, Any] = {"queue": False, "show_progress": "hidden"}
        at_once["api_visibility"] = "private"
        buttons = [page.draw, page.stop, page.status]
        size = [page.height, page.width]
        of_a_mode = [page.mode, page.source, page.image, page.editor, page.strength, *size]
        of_a_picture = [
            page.picture, page.status, page.shown, page.edit, page.inpaint, page.reuse
        ]  # fmt: skip
        settings = [  # in the order of the arguments of `draw`
            page.mode, page.prompt, page.image, page.editor, page.strength, page.negative_prompt,
            page.width, page.height, page.num_inference_steps, page.guidance_scale, page.seed,
            page.random_seed, page.sampler,
        ]  # fmt: skip
        asked = gr.on([page.draw.click, page.prompt.submit], self.begin, None, buttons, **at_once)
        drawing = asked.then(
            self.draw,
            [*settings, page.history],
            [*of_a_picture, page.gallery, page.history, page.seed],
            show_progress="hidden",
            concurrency_limit=1,
            concurrency_id="drawing",
            api_name="draw",
        )
        page.prompt.input(
            self.sketch,
            [
                page.while_typing, page.mode, page.prompt, page.negative_prompt, page.width,
                page.height, page.num_inference_steps, page.guidance_scale, page.seed, page.sampler,
            ],
            of_a_picture,
            show_progress="hidden",
            trigger_mode="always_last",  # what was typed during a drawing is drawn once, after it
            concurrency_id="drawing",
            api_visibility="private",
        )  # fmt: skip
        drawing.success(self.end, None, buttons[:2], **at_once)
        drawing.failure(self.end, None, buttons[:2], **at_once)
        page.stop.click(self.stop, None, buttons, cancels=[drawing], **at_once)
        page.gallery.select(self.select, page.history, of_a_picture, **at_once)
        page.mode.input(self.switch, page.mode, of_a_mode, **at_once)
        page.edit.click(self.edit_this, page.shown, of_a_mode, **at_once)
        page.inpaint.click(self.inpaint_this, page.shown, of_a_mode, **at_once)
        page.reuse.click(self.reuse, page.shown, [page.source, *settings], **at_once)
        page.image.upload(self.put_in, page.image, size, **at_once)
        page.editor.upload(self.put_into_editor, page.editor, size, **at_once)

    # Drawing

    def begin(self) -> Updates:
        """Show that a picture waits for its turn."""
        return {
            self.controls.draw: gr.update(interactive=False),
            self.controls.stop: gr.update(visible=True),
            self.controls.status: note("Waiting for its turn …"),
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
        sampler: str,
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
            sampler=sampler,
        )
        yield {self.controls.status: note("Starting …")}
        try:
            with _page_errors():
                for event in self.artist.draw(settings, *_pictures(mode, image, painted)):
                    if isinstance(event, Step):
                        yield self._while_drawing(event)
                    else:
                        yield self._drawn(self.save(event, settings), settings, history)
        except gr.Error as error:
            yield {self.controls.status: problem(html.unescape(error.message))}
            raise

    def sketch(
        self,
        while_typing: bool,
        mode: Any,
        prompt: str,
        negative_prompt: str,
        width: int,
        height: int,
        steps: int,
        guidance_scale: float,
        seed: int,
        sampler: str,
    ) -> Updates:
        """Draw what was typed so far, without keeping the picture."""
        if not while_typing or mode != "generate" or not prompt.strip():
            return {}
        settings = Settings(
            mode, prompt, negative_prompt, seed, steps, guidance_scale, height, width, 1.0, sampler
        )
        with _page_errors():
            *_, picture = self.artist.draw(settings)
            ignored = self.artist.ignored(settings)
        status = problem(ignored) if ignored else note(SKETCHED)
        return self._visible(picture, None, status)

    def end(self) -> Updates:
        """Show that the drawing has ended."""
        return {
            self.controls.draw: gr.update(interactive=True),
            self.controls.stop: gr.update(visible=False),
        }

    def stop(self) -> Updates:
        """Show that the drawing was stopped; Gradio closes the iterator of `draw`."""
        return self.end() | {
            self.controls.status: note("Stopped. The unfinished picture is not kept.")
        }

    def _while_drawing(self, step: Step) -> Updates:
        shown = {self.controls.picture: step.preview} if step.preview else {}
        return shown | {self.controls.status: progress(step.number, step.total)}

    def _drawn(self, drawn: Path, settings: Settings, history: list[str]) -> Updates:
        history = [str(drawn), *history][:HISTORY]
        captioned = [(path, read_metadata(path)["prompt"]) for path in history]
        shown = self._show(history[0])
        if ignored := self.artist.ignored(settings):
            shown[self.controls.status] = problem(ignored) + shown[self.controls.status]
        return shown | {
            self.controls.gallery: gr.update(value=captioned, selected_index=0, visible=True),
            self.controls.history: history,
            self.controls.seed: settings.seed,
        }

    # Pictures that were drawn

    def select(self, event: gr.SelectData, history: list[str]) -> Updates:
        """Show the picture of the gallery that was clicked."""
        return self._show(history[event.index])

    def _show(self, path: str) -> Updates:
        return self._visible(path, path, settings_list(read_metadata(path)))

    def _visible(self, picture: Any, path: str | None, status: str) -> Updates:
        """Show a picture; its buttons work if it has a path, as only a kept picture has."""
        page = self.controls
        works = gr.update(interactive=path is not None)
        buttons = dict.fromkeys([page.edit, page.inpaint, page.reuse], works)
        return buttons | {page.picture: picture, page.shown: path, page.status: status}

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
        settings.setdefault("sampler", "")
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
    if mode == "inpaint" and painted and painted["background"]:
        return _picture(painted["background"]), _mask(painted["layers"])
    return None, None


def _mask(layers: list[Any]) -> Image.Image | None:
    """Return a mask that is white where any of the layers is painted."""
    if len(layers) > MOST_LAYERS:
        raise ValueError(f"The painting has {len(layers)} layers; at most {MOST_LAYERS} are read.")
    masks = [_painted(load_layer(layer, "the painting")) for layer in layers]
    if len({mask.size for mask in masks}) > 1:
        raise ValueError("The layers of the painting differ in size; expected that of the picture.")
    return reduce(ImageChops.lighter, masks) if masks else None


def _painted(layer: Image.Image) -> Image.Image:
    """Return a mask that is white where a layer is painted."""
    return layer.convert("RGBA").getchannel("A").point(lambda alpha: 255 * (alpha > 0))


def _picture(source: Any) -> Image.Image:
    """Read a picture; errors have the name of its file, but not the server's folder."""
    return load_image(source, Path(source).name if isinstance(source, str) else None)


@contextmanager
def _page_errors() -> Iterator[None]:
    """Turn any error into a `gr.Error` with a message for the page, without server paths."""
    try:
        yield
    except gr.Error:
        raise
    except ValueError as error:
        raise _error(wording(error, PAGE)) from error
    except Exception as error:
        logger.exception("Something in the page failed")
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise _error(f"The server failed: {reason}. See its terminal.") from error


def _error(message: str) -> gr.Error:
    return gr.Error(html.escape(message, quote=False), print_exception=False)


def guard(page: gr.Blocks, uploads: Path) -> None:
    """Let a page read no files but uploads, and answer whatever is sent with a sentence.

    Args:
        page: its methods are replaced by which Gradio handles what visitors and programs send.
        uploads: the folder that Gradio keeps uploads in.
    """
    preprocess_data, process_api = page.preprocess_data, page.process_api

    async def preprocess(block_fn: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            _check_paths(inputs, uploads.resolve())
            return await preprocess_data(block_fn, inputs, *args, **kwargs)
        except gr.Error:
            raise
        except Exception as error:
            raise _error(UNREADABLE) from error

    async def process(*args: Any, **kwargs: Any) -> Any:
        try:
            return await process_api(*args, **kwargs)
        except gr.Error:
            raise
        except Exception as error:
            logger.exception("Something in the page failed")
            raise _error("The server can't do that. See its terminal.") from error

    vars(page).update(preprocess_data=preprocess, process_api=process)


def _check_paths(sent: Any, uploads: Path) -> None:
    """Raise ValueError if a path or an address in what was sent is not that of an upload."""
    if isinstance(sent, dict):
        path = sent.get("path")
        if isinstance(path, str) and not Path(path).resolve().is_relative_to(uploads):
            raise ValueError("not an upload")
        sent = list(sent.values())
    if isinstance(sent, list):
        for part in sent:
            _check_paths(part, uploads)


# Serving


def launch(page: gr.Blocks, host: str, port: int | None) -> str:
    """Serve the page in threads until `page.close()`, and return its address.

    Args:
        page: from `build_page`.
        host: an address of this machine.
        port: None chooses a free one.
    """
    theme = gr.themes.Default(
        primary_hue="indigo",
        neutral_hue="slate",
        radius_size="lg",
        font=["ui-sans-serif", "system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        mcp_server=False,
        footer_links=[],
        max_file_size="64mb",
        app_kwargs={"middleware": [Middleware(SelfContained)]},
        theme=theme.set(body_background_fill="*neutral_50"),
        css_paths=STYLE,
    )
    name = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    return f"http://{f'[{name}]' if ':' in name else name}:{page.server_port}"


class SelfContained:
    """ASGI middleware that sends `POLICY` with each response, and closes what no page needs."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on, unless it is for one of the `CLOSED` addresses or too long."""
        if any(part in scope.get("path", "") for part in CLOSED):
            await PlainTextResponse("This page has no such address.", 404)(scope, receive, send)
            return
        received = 0

        async def receive_some() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MOST_BYTES:
                raise HTTPException(413, "The request is too long.")
            return message

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", POLICY.encode())
                message["headers"] = [*message.get("headers", []), policy]
            await send(message)

        await self.app(scope, receive_some, send_with_policy)
