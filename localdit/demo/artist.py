"""The artist of the page: draws one picture at a time and reports its progress."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from ..images import load_image
from ..inference import inference_batches
from .preview import Previews
from .settings import Settings

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image

    from ..config import Config
    from ..pipelines import LocalDiTPipeline
    from ..pipelines.request import StepCallback

    Source = str | Path | Image.Image


@dataclass(frozen=True)
class Step:
    """A finished step of denoising.

    Attributes:
        number: number of the step, from 1 to `total`.
        total: number of steps.
        preview: the picture at this step, or None without a preview.
    """

    number: int
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
            settings: what to draw.
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
            settings.negative_prompt,
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
