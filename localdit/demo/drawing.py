"""Draws one picture at a time, and tells how it comes along."""

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
    """One step of denoising that is done.

    Attributes:
        number: from 1 to `total`.
        total: how many there are.
        preview: what the picture looks like by now, or None where none was made.
    """

    number: int
    total: int
    preview: Image.Image | None


class Artist:
    """One loaded model, drawing one picture at a time.

    Args:
        pipe: brings the components, which all modes share.
        config: of this model.
    """

    def __init__(self, pipe: LocalDiTPipeline, config: Config) -> None:
        self.pipe = pipe
        self.config = config
        self._turn = threading.Lock()  # the scheduler has state, and is shared
        pipe.set_progress_bar_config(disable=True)

    def draw(
        self, settings: Settings, image: Source | None = None, mask: Image.Image | None = None
    ) -> Iterator[Step | Image.Image]:
        """Draw a picture: hand out its steps as they are done, and at last the picture.

        A caller that closes the iterator stops the drawing: the step at hand is the last one, and
        when `close` returns, nothing of it runs any more.

        Args:
            settings: what to draw.
            image: to start from, in the modes "edit" and "inpaint".
            mask: of the image's size, white where it is to change, in the mode "inpaint". The
                picture then has the image's size.

        Raises:
            ValueError: if it can't be drawn; the message says why.
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

        # A daemon, so that a server that ends does not wait for the last step.
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
        """Check what is asked for, and return what draws it."""
        config = settings.configure(self.config)
        inputs: dict[str, Any] = {}
        if settings.mode != "generate":
            if image is None:
                raise ValueError("There is no picture to start from: put one in.")
            inputs["image"] = load_image(image)
        if settings.mode == "inpaint":
            if mask is None or not mask.getbbox():
                raise ValueError("Nothing is marked: paint over what is to change.")
            inputs["mask"] = mask
            if mask.size != (settings.width, settings.height):
                inputs["padding_mask_crop"] = max(mask.size)  # draw all of it, and scale back
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
    """A pipeline's callback that tells of each step, and ends the drawing once it is stopped."""
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
