"""`inference`: pictures from prompts, pictures and masks, with the settings of a `Config`."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from .config import config_field, inference_settings
from .core.samplers import SamplingSettings, make_sampler
from .core.text import check_prompts
from .images import fit_image, fit_mask, load_image, load_mask
from .sizes import check_size

__all__ = ["inference", "inference_batches"]

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from .config import Config
    from .pipelines import LocalDiTImg2ImgPipeline, LocalDiTInpaintPipeline, LocalDiTPipeline
    from .pipelines.request import StepCallback

    Source = str | Path | Image.Image
    Pipeline: TypeAlias = LocalDiTPipeline | LocalDiTImg2ImgPipeline | LocalDiTInpaintPipeline


def inference(
    pipe: Pipeline,
    prompts: str | Sequence[str],
    neg_prompts: str | Sequence[str] | None,
    config: Config,
    image: Source | Sequence[Source] | None = None,
    *,
    mask: Source | Sequence[Source] | None = None,
    padding_mask_crop: int | None = None,
    seed: int | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    latents: torch.Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Image.Image]:
    """Draw one picture per prompt.

    `config` sets height, width, denoising_steps, guidance_scale, max_length and batch_size, the
    number of pictures that are drawn at once; with an image also denoising_strength. A sampler that
    it names replaces the pipeline's scheduler.

    Args:
        pipe: the pipeline that `load_model` returned.
        prompts: one prompt or a list of them.
        neg_prompts: what the pictures should not show: a string for all of them or a list with one
            per prompt; None turns guidance off, whatever `config.guidance_scale` is.
        image: an image to start from (PIL, or a path): one for all prompts, or a list with one per
            prompt. `localdit.images.load_image` reads it; it is then scaled to cover
            height x width and cropped to it.
        mask: the parts of the image to repaint: one mask for all prompts, or a list with one per
            prompt, of the image's size; white is repainted, black is kept.
        padding_mask_crop: with a mask, draw only the mask and this many pixels around it. They are
            scaled to height x width, and the picture keeps its size.
        seed: picture i is drawn from seed + i, whatever the batch size; None chooses new seeds.
        generator: a generator for all pictures, or a list with one per picture, instead of a seed.
        latents: standard normal noise to start from, or to add to the image, `(N, C, h, w)`, with
            h = height / pixels per latent.
        progress: called as `progress(step, total)` after each denoising step; both count the steps
            of all batches.

    Returns:
        The pictures, in the order of the prompts.

    Raises:
        ValueError: a size that the model can't draw, no prompts, lists of different lengths,
            arguments that exclude each other, or a mask that does not fit its image.
    """
    batches = inference_batches(
        pipe,
        prompts,
        neg_prompts,
        config,
        image,
        mask=mask,
        padding_mask_crop=padding_mask_crop,
        seed=seed,
        generator=generator,
        latents=latents,
        progress=progress,
    )
    return [picture for batch in batches for picture in batch]


def inference_batches(
    pipe: Pipeline,
    prompts: str | Sequence[str],
    neg_prompts: str | Sequence[str] | None,
    config: Config,
    image: Source | Sequence[Source] | None = None,
    *,
    mask: Source | Sequence[Source] | None = None,
    padding_mask_crop: int | None = None,
    seed: int | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    latents: torch.Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
    callback_on_step_end: StepCallback | None = None,
) -> Iterator[list[Image.Image]]:
    """Return an iterator that draws one batch of pictures at a time.

    The arguments are those of `inference`, and are checked in this call. `callback_on_step_end` is
    that of the pipelines.
    """
    from .pipelines.request import check_generator, check_integer, check_tensor

    pipe.require_parts("inference", "transformer", "scheduler", "vae")
    for side in ("height", "width"):
        check_size(config_field(side), getattr(config, side), pipe.pixels_per_token)
    prompts = check_prompts(prompts if isinstance(prompts, str) else list(prompts), "prompts")
    count = len(prompts)
    settings = inference_settings(config)
    settings["max_sequence_length"] = config.max_length
    strength = settings.pop("strength")
    each: dict[str, list[Any]] = {"prompt": prompts}  # one entry per picture
    if neg_prompts is None:
        settings["guidance_scale"] = 1.0
    else:
        negatives = _one_each("neg_prompts", neg_prompts, count)
        each["negative_prompt"] = check_prompts(negatives, "neg_prompts")
    _warn_of_settings(SamplingSettings.of(pipe.config), settings)
    if config.sampler is not None:
        made = make_sampler(config.sampler, pipe.scheduler, settings["num_inference_steps"])
        pipe = _sibling(pipe, type(pipe), scheduler=made)
    if image is not None:
        pipe = _of_task(pipe, "Img2Img" if mask is None else "Inpaint")
        settings["strength"] = strength
        each["image"] = [load_image(one) for one in _one_each("image", image, count)]
    if mask is not None:
        if image is None:
            raise ValueError("mask is given without an image; expected the image to repaint")
        pairs = zip(_one_each("mask", mask, count), each["image"], strict=True)
        each["mask_image"] = [load_mask(one, picture.size) for one, picture in pairs]
        settings["padding_mask_crop"] = padding_mask_crop
    elif padding_mask_crop is not None:
        raise ValueError("padding_mask_crop is given without a mask; expected the mask, too")
    if padding_mask_crop is not None:
        check_integer("padding_mask_crop", padding_mask_crop, 0)
    else:  # with it, the pipeline scales the surroundings of the mask
        size = config.height, config.width
        if image is not None:
            each["image"] = [fit_image(one, *size) for one in each["image"]]
        if mask is not None:
            each["mask_image"] = [fit_mask(one, *size) for one in each["mask_image"]]
    if latents is not None:
        each["latents"] = _one_each("latents", list(latents), count)
        sides = (side // pipe.vae_scale_factor for side in (config.height, config.width))
        shape = (pipe.transformer.config.in_channels, *sides)
        for one in each["latents"]:
            check_tensor("latents", one, shape)
    if seed is not None:
        if generator is not None:
            raise ValueError("seed and generator are both given; expected one of them")
        each["generator"] = _generators(seed, count)
    elif isinstance(generator, Sequence):
        each["generator"] = _one_each("generator", generator, count)
        check_generator(each["generator"], count)
    else:
        check_generator(generator, count)
        settings["generator"] = generator
    settings["callback_on_step_end"] = callback_on_step_end
    return _run(pipe, each, settings, config.batch_size, progress)


def _generators(seed: int, count: int) -> list[torch.Generator]:
    """Return a generator per picture. On the CPU, a seed gives the same picture on every device."""
    import torch

    from .pipelines.request import check_integer

    check_integer("seed", seed, -(2**63), math.inf)
    if seed > 2**64 - count:
        raise ValueError(f"seed is {seed}; expected seeds below 2**64 for all {count} pictures")
    return [torch.Generator("cpu").manual_seed(int(seed) + i) for i in range(count)]


def _run(
    pipe: Callable[..., Any],
    each: dict[str, list[Any]],
    settings: dict[str, Any],
    batch_size: int,
    progress: Callable[[int, int], None] | None,
) -> Iterator[list[Image.Image]]:
    """Draw the batches; `each` has one entry per picture, `settings` are those of all.

    A batch ends early where the next image has another size.
    """
    import torch

    images = each.get("image", [])
    batches: list[list[int]] = []
    for i in range(len(each["prompt"])):
        full = not batches or len(batches[-1]) == batch_size
        if full or (images and images[i].size != images[i - 1].size):
            batches.append([])
        batches[-1].append(i)
    for number, batch in enumerate(batches):
        part: dict[str, Any] = {name: [values[i] for i in batch] for name, values in each.items()}
        if "latents" in part:
            part["latents"] = torch.stack(part["latents"])
        if progress:
            then = settings["callback_on_step_end"]
            part["callback_on_step_end"] = _step_callback(progress, number, len(batches), then)
        yield pipe(**(settings | part)).images


def _step_callback(
    progress: Callable[[int, int], None], batch: int, batches: int, then: StepCallback | None
) -> StepCallback:
    """Return a callback that counts the steps of all batches and then calls `then`."""

    def on_step_end(
        pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]
    ) -> dict[str, Any] | None:
        progress(batch * pipe.num_timesteps + step + 1, batches * pipe.num_timesteps)
        return then(pipe, step, timestep, tensors) if then else None

    return on_step_end


def _warn_of_settings(own: SamplingSettings, given: dict[str, Any]) -> None:
    """Log a warning if a model for few steps without guidance is drawn otherwise."""
    many = given["num_inference_steps"] >= SamplingSettings.num_inference_steps
    if own.few_steps and (many or given["guidance_scale"] > 1):
        logger.warning(
            "The model is made for %d steps without guidance, but the settings are %d steps with a "
            "guidance scale of %g: its own draw better pictures.",
            own.num_inference_steps,
            given["num_inference_steps"],
            given["guidance_scale"],
        )


def _one_each(name: str, given: Any, count: int) -> list[Any]:
    """Return a list with one entry per picture; a single value is used for all of them."""
    if isinstance(given, str) or not isinstance(given, Sequence):
        return [given] * count
    if len(given) != count:
        raise ValueError(f"{name} has {len(given)} entries for {count} prompts; expected one each")
    return list(given)


def _of_task(pipe: Any, task: str) -> Any:
    """Return the pipeline of another task, or the pipeline itself if it is of this task."""
    from . import pipelines

    kind = getattr(pipelines, f"LocalDiT{task}Pipeline")
    return pipe if isinstance(pipe, kind) else _sibling(pipe, kind)


def _sibling(pipe: Any, kind: Any, **changes: Any) -> Any:
    """Return a pipeline with the same components, but for the changes, and the same offloading."""
    sibling = kind.from_pipe(pipe, **changes)
    sibling.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    return sibling
