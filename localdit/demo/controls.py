"""The controls of the page and their places; `page.py` has what they do."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from ..config import inference_settings
from .settings import MAX_SEED, Offer

MODES = [("Generate", "generate"), ("Edit", "edit"), ("Inpaint", "inpaint")]
BRUSH = "#ff2d95"  # visible on most pictures


@dataclass(frozen=True)
class Controls:
    """The controls that say what to draw."""

    mode: gr.Radio
    source: gr.Column  # visible in the modes that start from a picture
    image: gr.Image
    editor: gr.ImageEditor
    strength: gr.Slider
    prompt: gr.Textbox
    draw: gr.Button
    stop: gr.Button
    negative_prompt: gr.Textbox
    width: gr.Slider
    height: gr.Slider
    num_inference_steps: gr.Slider
    guidance_scale: gr.Slider
    seed: gr.Number
    random_seed: gr.Checkbox

    @property
    def settings(self) -> list[Any]:
        """The inputs of a drawing, in the order of the arguments of `page.Desk.draw`."""
        return [
            self.mode, self.prompt, self.image, self.editor, self.strength, self.negative_prompt,
            self.width, self.height, self.num_inference_steps, self.guidance_scale, self.seed,
            self.random_seed,
        ]  # fmt: skip

    @property
    def of_a_mode(self) -> list[Any]:
        """The controls that change with the mode."""
        return [
            self.mode, self.source, self.image, self.editor, self.strength, self.height, self.width
        ]  # fmt: skip


@dataclass(frozen=True)
class Results:
    """The parts of the page that show what was drawn."""

    picture: gr.Image
    status: gr.HTML
    edit: gr.Button
    inpaint: gr.Button
    reuse: gr.Button
    gallery: gr.Gallery
    shown: gr.State  # path of the visible picture, None before the first one
    history: gr.State  # paths of the session's pictures, newest first

    @property
    def actions(self) -> list[gr.Button]:
        """The buttons for the visible picture."""
        return [self.edit, self.inpaint, self.reuse]

    @property
    def of_a_picture(self) -> list[Any]:
        """The components that change with the visible picture."""
        return [self.picture, self.status, self.shown, *self.actions]


def lay_out(offer: Offer) -> tuple[Controls, Results]:
    """Lay out the three parts of the page; `style.css` places them side by side if they fit."""
    with gr.Row(elem_id="desk"):
        with gr.Column(elem_id="ask"):
            asked = _lay_out_request(offer)
        with gr.Column(elem_id="result"):
            results = _lay_out_results()
        with gr.Column(elem_id="more"):
            _lay_out_examples(offer, asked["prompt"])
            settings = _lay_out_settings(offer)
    return Controls(**asked, **settings), results


def _lay_out_request(offer: Offer) -> dict[str, Any]:
    """Lay out the controls for the picture to draw and the one to start from."""
    mode = gr.Radio(MODES, value="generate", show_label=False, container=False, elem_id="mode")
    with gr.Column(visible=False, elem_id="source") as source:
        image = gr.Image(
            offer.picture,
            label="Picture to start from",
            sources=["upload", "clipboard"],
            type="filepath",
            format="png",
            height=280,
            buttons=[],
            elem_id="image",
        )
        vars(image)["preprocess"] = _path_of
        editor = gr.ImageEditor(
            offer.picture,
            label="Paint over what should change",
            sources=["upload", "clipboard"],
            type="pil",
            transforms=(),
            brush=gr.Brush(colors=[(BRUSH, 0.7)], default_color=(BRUSH, 0.7), color_mode="fixed"),
            layers=False,
            format="png",
            height=420,
            visible=False,
            buttons=[],
            elem_id="editor",
        )
        strength = gr.Slider(
            0, 1, offer.strength["edit"], step=0.05, label="Strength",
            info="0 keeps the picture, 1 ignores it", elem_id="strength",
        )  # fmt: skip
    prompt = gr.Textbox(
        offer.prompts[0],
        label="Prompt",
        placeholder="What the picture shows",
        lines=2,
        max_lines=6,
        elem_id="prompt",
    )
    with gr.Row(elem_id="buttons"):
        draw = gr.Button("Draw", variant="primary", elem_id="draw")
        stop = gr.Button("Stop", variant="stop", visible=False, elem_id="stop")
    return {
        "mode": mode, "source": source, "image": image, "editor": editor, "strength": strength,
        "prompt": prompt, "draw": draw, "stop": stop,
    }  # fmt: skip


def _path_of(upload: Any) -> Any:
    """Return the path of an upload, for `load_image` to read.

    Gradio itself would try all of Pillow's readers, and say little if they fail.
    """
    return upload and upload.path


def _lay_out_examples(offer: Offer, prompt: gr.Textbox) -> None:
    """Lay out example prompts; a click puts one into the page."""
    with gr.Column(elem_id="try"):
        gr.HTML(note("Prompts to try"))
        for text in offer.prompts:
            button = gr.Button(text, size="sm")
            button.click(None, None, prompt, js=f"() => {json.dumps(text)}")


def _lay_out_settings(offer: Offer) -> dict[str, Any]:
    """Lay out the settings that seldom change."""
    first = inference_settings(offer.config)
    with gr.Accordion("Settings", elem_id="settings"):
        negative_prompt = gr.Textbox(
            offer.negative_prompt,
            label="Negative prompt",
            placeholder="What the picture should not show",
            max_lines=4,
        )
        with gr.Row():
            width = _side("Width", offer.config.width, offer)
            height = _side("Height", offer.config.height, offer)
        with gr.Row():
            num_inference_steps = gr.Slider(
                1, 100, first["num_inference_steps"], step=1, precision=0, label="Steps"
            )
            guidance_scale = gr.Slider(1, 15, first["guidance_scale"], step=0.5, label="Guidance")
        with gr.Row(equal_height=True):
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED)
            random_seed = gr.Checkbox(True, label="New for each picture")
    return {
        "negative_prompt": negative_prompt, "width": width, "height": height,
        "num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale,
        "seed": seed, "random_seed": random_seed,
    }  # fmt: skip


def _lay_out_results() -> Results:
    """Lay out the picture, its settings and buttons, and the gallery."""
    picture = gr.Image(
        label="Picture",
        show_label=False,
        interactive=False,
        type="filepath",
        format="png",
        height="min(60vh, 520px)",
        buttons=["download", "fullscreen"],
        elem_id="picture",
    )
    status = gr.HTML(note("Say what the picture shows, and press Draw."), elem_id="status")
    with gr.Row(elem_id="actions"):
        edit = gr.Button("Edit this", size="sm", interactive=False)
        inpaint = gr.Button("Inpaint this", size="sm", interactive=False)
        reuse = gr.Button("Use its settings", size="sm", interactive=False)
    gallery = gr.Gallery(
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
    return Results(
        picture, status, edit, inpaint, reuse, gallery, shown=gr.State(None), history=gr.State([])
    )


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
