"""The artist of the page: its settings, its previews, and one picture at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Literal

from ..config import Config, with_settings
from ..core.text import unused_negative_prompt
from ..errors import FieldError, Vocabulary
from ..images import load_image
from ..inference import inference_batches

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from PIL import Image

    from ..pipelines import LocalDiTPipeline
    from ..pipelines.base import LocalDiTBasePipeline
    from ..pipelines.request import StepCallback

    Source = str | Path | Image.Image


Mode = Literal["generate", "edit", "inpaint"]
MAX_SEED = 2**53 - 1  # the largest integer up to which browsers are exact

# The page's names of fields, which are the labels of its controls.
PAGE = Vocabulary(
    {
        "num_inference_steps": "Steps",
        "strength": "Strength",
        "guidance_scale": "Guidance",
        "height": "Height",
        "width": "Width",
        "sampler": "Sampler",
    },
    advice="set {name} to {value}",
)


@dataclass(frozen=True)
class Settings:
    """The settings of one picture, without the pictures that are uploaded."""

    mode: Mode
    prompt: str
    negative_prompt: str  # what the picture should not show
    seed: int  # at least 0
    num_inference_steps: int
    guidance_scale: float  # weight of the prompt; 1 or less turns guidance off
    height: int  # pixels
    width: int  # pixels
    strength: float  # how much to change, in [0, 1]; "generate" does not use it
    sampler: str = ""  # a name of `localdit.core.samplers`; empty for the model's own

    def configure(self, config: Config) -> Config:
        """Return a Config that draws this picture with the model of `config`.

        Raises:
            ValueError: the settings cannot work; the message uses the labels of the page.
        """
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise ValueError("The prompt is empty: describe the picture.")
        if type(self.seed) is not int or not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"The seed must be a whole number from 0 to {MAX_SEED}.")
        names = ("num_inference_steps", "strength", "guidance_scale", "height", "width")
        try:
            drawn = {name: getattr(self, name) for name in names}
            return with_settings(config, drawn | {"sampler": self.sampler or None})
        except FieldError as error:
            raise ValueError(error.worded(PAGE)) from error


@dataclass(frozen=True)
class Step:
    """A finished step of denoising."""

    number: int  # from 1 to `total`
    total: int
    preview: Image.Image | None


class Artist:
    """Draws with one loaded model, one picture at a time.

    Args:
        pipe: the model; all modes share its components.
        config: settings that describe this model.
    """

    def __init__(self, pipe: LocalDiTPipeline, config: Config) -> None:
        self.pipe = pipe
        self.config = config
        self._turn = threading.Lock()  # drawings share the scheduler, which has state
        pipe.set_progress_bar_config(disable=True)

    def draw(
        self, settings: Settings, image: Source | None = None, mask: Image.Image | None = None
    ) -> Iterator[Step | Image.Image]:
        """Draw a picture: yield each step when it is finished, then the picture.

        Closing the iterator stops the drawing after the current step; when `close` returns, the
        drawing has stopped.

        Args:
            image: the picture to start from, in the modes "edit" and "inpaint".
            mask: in the mode "inpaint", white where the image should change; of the image's size,
                which is also that of the drawn picture.

        Raises:
            ValueError: the picture can't be drawn; the message says why.
        """
        events: SimpleQueue[Step | Image.Image | Exception] = SimpleQueue()
        stopped = threading.Event()
        make = self._prepare(settings, image, mask, _reporting(events, stopped))

        def work() -> None:
            try:
                with self._turn:
                    if not stopped.is_set():
                        events.put(make())
            except Exception as error:
                events.put(error)

        # A daemon, so that a server that shuts down does not wait for the last step.
        worker = threading.Thread(target=work, name="localdit-drawing", daemon=True)
        worker.start()
        try:
            while isinstance(event := events.get(), Step):
                yield event
            if isinstance(event, Exception):
                raise event
            yield event
        finally:
            stopped.set()
            worker.join()

    def ignored(self, settings: Settings) -> str:
        """Return a warning about what the model ignores in the prompts, or ""."""
        negative = settings.negative_prompt or ""
        unused = unused_negative_prompt(negative, guided=settings.guidance_scale > 1)
        with self._turn:  # a tokenizer has state
            unknown = self.pipe.text_space.unknown([settings.prompt, "" if unused else negative])
        return " ".join(warning for warning in (unknown, unused) if warning)

    def _prepare(
        self,
        settings: Settings,
        image: Source | None,
        mask: Image.Image | None,
        on_step_end: StepCallback,
    ) -> Callable[[], Image.Image]:
        """Check the settings, and return a function that draws the picture."""
        config = settings.configure(self.config)
        inputs: dict[str, Any] = {}
        if settings.mode != "generate":
            if image is None:
                raise ValueError("There is no picture to start from: upload one.")
            inputs["image"] = load_image(image)
        if settings.mode == "inpaint":
            if mask is None or not mask.getbbox():
                raise ValueError("Nothing is marked: paint over what should change.")
            inputs["mask"] = mask
            if mask.size != (settings.width, settings.height):
                inputs["padding_mask_crop"] = max(mask.size)  # draw the whole picture, scaled
        batches = inference_batches(
            self.pipe,
            settings.prompt,
            settings.negative_prompt or "",  # None would switch guidance off
            config,
            seed=settings.seed,
            callback_on_step_end=on_step_end,
            **inputs,
        )
        return lambda: next(batches)[0]


def _reporting(events: SimpleQueue[Any], stopped: threading.Event) -> StepCallback:
    """Return a callback of a pipeline that reports each step and ends a stopped drawing."""
    previews = Previews()

    def on_step_end(
        pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]
    ) -> dict[str, Any]:
        if stopped.is_set():
            pipe._interrupt = True
        else:
            preview = previews.of(pipe, tensors["latents"])
            events.put(Step(index + 1, pipe.num_timesteps, preview))
        return {}

    return on_step_end


# Previews


class Previews:
    """Makes the previews of one drawing within a share of its time.

    After a preview, the drawing goes on for at least `work_per_preview` times as long as the
    preview took. A slow autoencoder thus makes fewer previews, not a slower drawing.
    """

    def __init__(self, work_per_preview: float = 2.0) -> None:
        self._work_per_preview = work_per_preview
        self._next = 0.0  # on the clock of `time.monotonic`

    def of(self, pipe: LocalDiTBasePipeline, latents: torch.Tensor) -> Image.Image | None:
        """Return a preview of the first picture of a batch, or None if it is too early for one.

        `latents` are those after the step, `(B, C, H, W)`.
        """
        start = time.monotonic()
        # With offloading, decoding between two steps would move models between CPU and GPU.
        if start < self._next or hasattr(pipe.vae, "_hf_hook"):
            return None
        picture = decode_small(pipe, expected_latents(pipe.scheduler, latents)[:1])
        end = time.monotonic()
        self._next = end + self._work_per_preview * (end - start)
        return picture


def expected_latents(scheduler: Any, latents: torch.Tensor) -> torch.Tensor:
    """Return the latest step's estimate of the latents without noise, `(B, C, H, W)`.

    DPM-Solver++ and UniPC keep this estimate for their next step. With other schedulers, the noisy
    latents themselves are returned.
    """
    config = scheduler.config
    solves_for_them = "++" in config.get("algorithm_type", "") or config.get("predict_x0", False)
    kept = getattr(scheduler, "model_outputs", None)
    return kept[-1] if solves_for_them and kept and kept[-1] is not None else latents


def decode_small(pipe: LocalDiTBasePipeline, latents: torch.Tensor) -> Image.Image:
    """Decode latents `(1, C, H, W)` into a small picture; see `LatentSpace.decode_preview`."""
    import torch

    with torch.no_grad():
        decoded = pipe.latent_space.decode_preview(latents)
    return pipe.image_processor.postprocess(decoded, output_type="pil")[0]
