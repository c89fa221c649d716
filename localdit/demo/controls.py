"""The controls of the page and their places; `page.py` says what they do."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr
from PIL import Image

from ..config import Config, inference_settings
from .artist import MAX_SEED

MODES = [("Generate", "generate"), ("Edit", "edit"), ("Inpaint", "inpaint")]
BRUSH = ("#ff2d95", 0.7)  # colour and opacity; visible on most pictures


@dataclass(frozen=True)
class Offer:
    """The values that the page starts with, and its limits.

    Attributes:
        config: the first settings.
        negative_prompt: the first negative prompt.
        prompts: examples; the first is in the page.
        strength: the first strength of each mode that has one.
        picture: a picture to try "edit" and "inpaint" with.
        multiple: pixels per token; heights and widths are multiples of it.
    """

    config: Config
    negative_prompt: str
    prompts: Sequence[str]
    strength: Mapping[str, float]
    picture: Image.Image | None
    multiple: int

    @property
    def sides(self) -> tuple[int, int, int]:
        """The shortest and the longest side of a picture, and the step between sides, in pixels."""
        longest = 2 * max(self.config.height, self.config.width)
        return self.multiple, longest, self.multiple


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
        self.mode = gr.Radio(
            MODES, value="generate", show_label=False, container=False, elem_id="mode"
        )
        with gr.Column(visible=False, elem_id="source") as self.source:
            self.image = gr.Image(
                offer.picture,
                label="Picture to start from",
                sources=["upload", "clipboard"],
                type="filepath",
                format="png",
                height=280,
                buttons=[],
                elem_id="image",
            )
            vars(self.image)["preprocess"] = _path_of
            self.editor = gr.ImageEditor(
                offer.picture,
                label="Paint over what should change",
                sources=["upload", "clipboard"],
                type="pil",
                transforms=(),
                brush=gr.Brush(colors=[BRUSH], default_color=BRUSH, color_mode="fixed"),
                layers=False,
                format="png",
                height=420,
                visible=False,
                buttons=[],
                elem_id="editor",
            )
            self.strength = gr.Slider(
                0, 1, offer.strength["edit"], step=0.05, label="Strength",
                info="0 keeps the picture, 1 ignores it", elem_id="strength",
            )  # fmt: skip
        self.prompt = gr.Textbox(
            offer.prompts[0],
            label="Prompt",
            placeholder="What the picture shows",
            lines=2,
            max_lines=6,
            elem_id="prompt",
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
            self.negative_prompt = gr.Textbox(
                offer.negative_prompt,
                label="Negative prompt",
                placeholder="What the picture should not show",
                max_lines=4,
            )
            with gr.Row():
                self.width = _side("Width", offer.config.width, offer)
                self.height = _side("Height", offer.config.height, offer)
            with gr.Row():
                self.num_inference_steps = gr.Slider(
                    1, 100, first["num_inference_steps"], step=1, precision=0, label="Steps"
                )
                self.guidance_scale = gr.Slider(
                    1, 15, first["guidance_scale"], step=0.5, label="Guidance"
                )
            with gr.Row(equal_height=True):
                self.seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED)
                self.random_seed = gr.Checkbox(True, label="New for each picture")

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
        self.status = gr.HTML(note("Say what the picture shows, and press Draw."), elem_id="status")
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


def _path_of(upload: Any) -> Any:
    """Return the path of an upload, for `load_image` to read.

    Gradio itself would try all of Pillow's readers, and say little if they fail.
    """
    return upload and upload.path


def _side(label: str, value: int, offer: Offer) -> gr.Slider:
    shortest, longest, step = offer.sides
    return gr.Slider(shortest, longest, value, step=step, precision=0, label=label)


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
