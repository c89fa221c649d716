"""The controls of the page and their places; `page.py` says what they do."""

from __future__ import annotations

import json
from abc import ABCMeta
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from typing import Any

import gradio as gr
from gradio.components.base import server
from gradio.components.image_editor import AcceptBlobs
from PIL import Image
from starlette.exceptions import HTTPException

from ..config import Config, inference_settings
from .artist import MAX_SEED

MODES = [("Generate", "generate"), ("Edit", "edit"), ("Inpaint", "inpaint")]
MOST_LAYERS = 16  # of a painting
MOST_PAINTINGS = 128  # that were sent ahead and wait to be drawn
QUICK_PASSES = 4  # of a model that draws while one types
BRUSH = ("#ff2d95", 0.7)  # colour and opacity; visible on most pictures


@dataclass(frozen=True)
class Offer:
    """The values that the page starts with, and its limits."""

    config: Config  # the first settings
    prompts: Sequence[str]  # examples; the first is in the page
    strength: Mapping[str, float]  # the first strength of each mode that has one
    picture: Image.Image | None  # a picture to try "edit" and "inpaint" with
    multiple: int  # pixels per token; heights and widths are multiples of it
    samplers: Sequence[str] = ()  # names of the samplers that suit the model

    @property
    def sides(self) -> tuple[int, int, int]:
        """The shortest and the longest side of a picture, and the step between sides, in pixels."""
        longest = 2 * max(self.config.height, self.config.width)
        return self.multiple, longest, self.multiple

    @property
    def quick(self) -> bool:
        """Whether the model is fast enough to draw while the visitor types."""
        first = inference_settings(self.config)
        passes = first["num_inference_steps"] * (2 if first["guidance_scale"] > 1 else 1)
        return passes <= QUICK_PASSES


# Input from visitors


def _reading(component: Any, preprocess: Callable[..., Any], **methods: Any) -> Any:
    """Return a component that reads what is sent to it with `preprocess(self, payload)`.

    It is a class, because Gradio makes new components of the same class for each visitor. To
    derive it as usual would write a file of types beside this one.
    """
    methods |= {"preprocess": preprocess, "__module__": component.__module__}
    return ABCMeta.__new__(type(component), component.__name__, (component,), methods)


def _checked(component: Any, expected: str, kinds: tuple[type, ...]) -> Any:
    """Return a component whose error for an unusable value names its label.

    Args:
        component: one of Gradio's.
        expected: what it takes, with placeholders for its attributes.
        kinds: the types of what is sent.
    """

    def preprocess(self: Any, payload: Any) -> Any:
        try:
            if type(payload) not in kinds:
                raise TypeError
            read = component.preprocess(self, payload)
            if read != payload:  # Gradio would round it
                raise ValueError
            return read
        except Exception as error:
            given = repr(payload)
            given = given if len(given) < 60 else f"{given[:60]} …"
            what = expected.format_map(vars(self))
            message = f"{self.label} is {given}; expected {what}."
            raise gr.Error(escape(message, quote=False), print_exception=False) from error

    return _reading(component, preprocess)


def _picture_of(self: Any, upload: Any) -> str | None:
    """Return the path of an upload, for `load_image` to read.

    Gradio itself would try all of Pillow's readers, one of which starts another program.
    """
    return upload and upload.path


def _painting_of(self: Any, sent: Any) -> dict[str, Any] | None:
    """Return the background and the layers of an editor, as paths or open files.

    Browsers send them ahead, under an `id`.
    """
    if sent is None:
        return None
    if sent.id is not None:
        sent = self.blob_storage.pop(sent.id, None)
    if sent is None:
        return None

    def source(part: Any) -> Any:
        return BytesIO(part) if isinstance(part, bytes) else part.path

    return {
        "background": source(sent.background) if sent.background else None,
        "layers": [source(layer) for layer in sent.layers or [] if layer],
    }


def accept_blobs(self: Any, data: AcceptBlobs) -> None:
    """Keep a part that a browser sends ahead; parts of too many paintings are forgotten."""
    index = data.data.get("index")
    if str(index) not in [*map(str, range(MOST_LAYERS)), "null", "None", ""]:
        raise HTTPException(400, f"A painting has at most {MOST_LAYERS} layers.")
    if data.data["id"] not in self.blob_storage and len(self.blob_storage) >= MOST_PAINTINGS:
        del self.blob_storage[next(iter(self.blob_storage))]
    gr.ImageEditor.accept_blobs(self, data)


Picture = _reading(gr.Image, _picture_of)
Painting = _reading(gr.ImageEditor, _painting_of, accept_blobs=server(accept_blobs))
Buttons = _checked(gr.Radio, f"one of {', '.join(mode for _, mode in MODES)}", (str,))
Selection = _checked(gr.Dropdown, "one of the listed values", (str,))
Text = _checked(gr.Textbox, "text", (str, type(None)))
Slider = _checked(gr.Slider, "a number from {minimum} to {maximum}", (int, float))
Number = _checked(gr.Number, "a whole number from {minimum} to {maximum}", (int, float, type(None)))
Switch = _checked(gr.Checkbox, "true or false", (bool, type(None)))


# The page


class Controls:
    """The components of the page; `style.css` places its three parts side by side if they fit."""

    def __init__(self, offer: Offer) -> None:
        with gr.Row(elem_id="desk"):
            with gr.Column(elem_id="ask"):
                self._lay_out_request(offer)
            with gr.Column(elem_id="result"):
                self._lay_out_results()
            with gr.Column(elem_id="more"):
                self._lay_out_examples(offer)
                self._lay_out_settings(offer)

    def _lay_out_request(self, offer: Offer) -> None:
        """Lay out the controls for the picture to draw and the one to start from."""
        self.mode = Buttons(
            MODES, value="generate", label="Mode", show_label=False, container=False, elem_id="mode"
        )
        with gr.Column(visible=False, elem_id="source") as self.source:
            self.image = Picture(
                offer.picture,
                label="Picture to start from",
                sources=["upload", "clipboard"],
                type="filepath",
                format="png",
                height=280,
                buttons=[],
                elem_id="image",
            )
            self.editor = Painting(
                offer.picture,
                label="Paint over what should change",
                sources=["upload", "clipboard"],
                transforms=(),
                brush=gr.Brush(colors=[BRUSH], default_color=BRUSH, color_mode="fixed"),
                layers=False,
                format="png",
                height=420,
                visible=False,
                buttons=[],
                elem_id="editor",
            )
            self.strength = Slider(
                0, 1, offer.strength["edit"], step=0.05, label="Strength",
                info="0 keeps the picture, 1 ignores it", elem_id="strength",
            )  # fmt: skip
        self.prompt = Text(
            offer.prompts[0],
            label="Prompt",
            placeholder="What the picture shows",
            lines=2,
            max_lines=6,
            elem_id="prompt",
        )
        self.while_typing = Switch(
            offer.quick, label="Draw while typing", visible=offer.quick, elem_id="typing"
        )
        with gr.Row(elem_id="buttons"):
            self.draw = gr.Button("Draw", variant="primary", elem_id="draw")
            self.stop = gr.Button("Stop", variant="stop", visible=False, elem_id="stop")

    def _lay_out_examples(self, offer: Offer) -> None:
        """Lay out example prompts; a click puts one into the page."""
        with gr.Column(elem_id="try"):
            gr.HTML(note("Prompts to try"))
            for text in offer.prompts:
                button = gr.Button(text, size="sm")
                button.click(None, None, self.prompt, js=f"() => {json.dumps(text)}")

    def _lay_out_settings(self, offer: Offer) -> None:
        """Lay out the settings that seldom change."""
        first = inference_settings(offer.config)
        with gr.Accordion("Settings", elem_id="settings"):
            self.negative_prompt = Text(
                "",
                label="Negative prompt",
                placeholder="What the picture should not show",
                max_lines=4,
            )
            with gr.Row():
                self.width = _side("Width", offer.config.width, offer)
                self.height = _side("Height", offer.config.height, offer)
            with gr.Row():
                steps, guidance = first["num_inference_steps"], first["guidance_scale"]
                self.num_inference_steps = Slider(
                    1, max(100, steps), steps, step=1, precision=0, label="Steps"
                )
                self.guidance_scale = Slider(
                    min(1, guidance), max(15, guidance), guidance, step=0.5, label="Guidance"
                )
            own = ("the model's own", "")
            self.sampler = Selection(
                [own, *((name, name) for name in offer.samplers)], value="", label="Sampler"
            )
            with gr.Row(equal_height=True):
                self.seed = Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED)
                # While typing, only the words are to change the picture.
                self.random_seed = Switch(not offer.quick, label="New for each picture")

    def _lay_out_results(self) -> None:
        """Lay out the picture, its settings and buttons, and the gallery."""
        self.picture = gr.Image(
            label="Picture",
            show_label=False,
            interactive=False,
            type="filepath",
            format="png",
            height="min(60vh, 520px)",
            buttons=["download", "fullscreen"],
            elem_id="picture",
        )
        self.status = gr.HTML(note("Describe the picture, and press Draw."), elem_id="status")
        with gr.Row(elem_id="actions"):
            self.edit = gr.Button("Edit this", size="sm", interactive=False)
            self.inpaint = gr.Button("Inpaint this", size="sm", interactive=False)
            self.reuse = gr.Button("Use its settings", size="sm", interactive=False)
        self.gallery = gr.Gallery(
            label="Drawn so far",
            show_label=False,
            columns=6,
            fit_columns=False,
            height="auto",
            object_fit="contain",
            allow_preview=False,
            interactive=False,
            buttons=[],
            visible=False,
            elem_id="gallery",
        )
        self.shown = gr.State(None)  # path of the visible picture, None before the first one
        self.history = gr.State([])  # paths of the session's pictures, newest first


def _side(label: str, value: int, offer: Offer) -> Any:
    shortest, longest, step = offer.sides
    return Slider(shortest, longest, value, step=step, precision=0, label=label)


# HTML


def header(about: Sequence[str]) -> str:
    """Return the head of the page: its name, and facts about the model."""
    facts = " · ".join(map(escape, about))
    return f'<header class="name"><h1>LocalDiT</h1><p>{facts}</p></header>'


def note(text: str) -> str:
    """Return a line about what is happening."""
    return f'<p class="note" role="status">{escape(text)}</p>'


def problem(text: str) -> str:
    """Return the reason why nothing was drawn."""
    return f'<p class="problem" role="alert">{escape(text)}</p>'


def progress(step: int, total: int) -> str:
    """Return a bar that shows how far a drawing is."""
    done = f'<i style="width: {100 * step / total:.0f}%"></i>'
    return f'<div class="bar">{done}</div>' + note(f"Step {step} of {total}")


def settings_list(settings: Mapping[str, Any]) -> str:
    """Return the settings of a picture, its prompt first, without empty ones."""
    facts = "".join(
        f"<li><span>{escape(name.replace('_', ' '))}</span> {escape(str(value))}</li>"
        for name, value in settings.items()
        if name != "prompt" and value not in ("", None)
    )
    prompt = escape(str(settings.get("prompt", "")))
    return f'<p class="prompt">{prompt}</p><ul class="settings">{facts}</ul>'
