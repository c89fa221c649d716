"""Inpainting: parts of pictures are repainted, the rest is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from PIL import Image

from ..core.schedulers import initial_scale
from .image_inputs import REPAINTED, read_images, read_masks, scale_images
from .image_to_image import FromImagesPipeline
from .request import (
    Generators,
    Request,
    StepCallback,
    TextEmbeddings,
    check_integer,
    check_number,
    check_one_each,
)

Box = tuple[int, int, int, int]  # left, top, right, bottom: pixels, the latter two exclusive


@dataclass(frozen=True)
class Canvas:
    """Pictures and masks to work on: one of each for all prompts, or one per prompt."""

    images: torch.Tensor  # (N, 3, H, W) in [0, 1]
    masks: torch.Tensor  # (M, 1, H, W) in [0, 1], 1 = repaint
    # The crop of each of the max(N, M) pairs; None to scale whole pictures
    boxes: list[Box] | None = None

    @classmethod
    def around_masks(
        cls, images: torch.Tensor, masks: torch.Tensor, height: int, width: int, padding: int
    ) -> Canvas:
        """Return a canvas with crops around the masks, with `padding` pixels on each side.

        A crop has the proportions of `height` to `width` if the picture is large enough.
        """
        marked = (masks[:, 0] >= REPAINTED).to("cpu", torch.uint8).numpy() * 255
        regions = [
            VaeImageProcessor.get_crop_region(Image.fromarray(mask), width, height, padding)
            for mask in marked
        ]
        count = max(len(images), len(masks))
        return cls(images, masks, [regions[i % len(regions)] for i in range(count)])

    def pictures(self, height: int, width: int) -> torch.Tensor:
        """Return the pictures or their crops, scaled to `height` x `width` pixels."""
        return torch.cat([scale_images(crop, height, width) for crop in self._crops(self.images)])

    def latents_to_repaint(self, height: int, width: int) -> torch.Tensor:
        """Return `latents_to_repaint` of the masks or their crops, `(N, 1, height, width)`."""
        return torch.cat(
            [latents_to_repaint(crop, height, width) for crop in self._crops(self.masks)]
        )

    def _crops(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Return the crop of each row, or all rows whole."""
        if self.boxes is None:
            return [tensor]
        rows = _rows(tensor, len(self.boxes))[:, None]
        return [
            row[..., top:bottom, left:right]
            for row, (left, top, right, bottom) in zip(rows, self.boxes, strict=True)
        ]

    def put_back(self, pictures: torch.Tensor) -> torch.Tensor:
        """Blend repainted parts `(B, 3, height, width)` into the pictures, weighted by the masks.

        Returns:
            `(B, 3, H, W)` in [0, 1], float32, or `(B, 3, height, width)` without boxes; where the
            mask is 0, the picture is unchanged.
        """
        images, masks = (
            _rows(whole, len(pictures)).to(pictures.device) for whole in (self.images, self.masks)
        )
        if self.boxes is None:
            height, width = pictures.shape[-2:]
            images = scale_images(images, height, width)
            masks = scale_images(masks, height, width, "bilinear")
            return torch.lerp(images, pictures.float(), masks)
        painted = images.clone()
        repeats = len(pictures) // len(self.boxes)
        for row, picture in enumerate(pictures.float()):
            left, top, right, bottom = self.boxes[row // repeats]
            size = bottom - top, right - left
            painted[row, :, top:bottom, left:right] = scale_images(picture[None], *size)[0]
        return torch.lerp(images, painted, masks)


def latents_to_repaint(masks: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return True for each latent that covers a pixel to repaint, `(M, 1, height, width)`.

    The masks are not scaled to the size of the drawing first, which would average thin lines away.

    Args:
        masks: `(M, 1, H, W)` in [0, 1].
        height, width: the size in latents.
    """
    return F.adaptive_max_pool2d(masks, (height, width)) >= REPAINTED


def _rows(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """Repeat each row so that there are `count` rows."""
    return tensor.repeat_interleave(count // len(tensor), dim=0)


class LocalDiTInpaintPipeline(FromImagesPipeline):
    """Repaint parts of pictures to follow prompts; the other pixels stay exactly the same.

    After each step, the kept latents are put back with the noise of that step (RePaint, Lugmayr et
    al., 2022, without its resampling). See `LocalDiTBasePipeline` for the components.
    """

    @property
    def mask_processor(self) -> VaeImageProcessor:
        """Diffusers' tools for masks, such as `mask_processor.blur(mask, blur_factor=8)`."""
        return VaeImageProcessor(
            vae_scale_factor=self.vae_scale_factor,
            do_normalize=False,
            do_binarize=True,
            do_convert_grayscale=True,
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: Any = None,
        mask_image: Any = None,
        strength: float = 1.0,
        padding_mask_crop: int | None = None,
        negative_prompt: str | list[str] | None = "",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 120,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        cross_attention_kwargs: dict[str, Any] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Repaint parts of pictures to follow prompts.

        The other arguments are those of `LocalDiTPipeline`.

        Args:
            prompt: one prompt or a list of B, describing the whole picture.
            image: one image for all prompts or a list of B: PIL images, arrays `(H, W, 3)` or
                tensors `(3, H, W)` in [0, 1], or latents as `output_type="latent"` returns them.
            mask_image: one mask for all prompts or a list of B, of the image's size in pixels: PIL
                images, arrays `(H, W)` or tensors `(1, H, W)` in [0, 1]. White (0.5 or more) is
                repainted. Values between 0 and 1 blend old and new, so a blurred mask hides the
                seam. Where the mask is 0, the picture does not change.
            strength: how much to change the repainted part, in [0, 1], as in image to image. At 1
                it starts from pure noise.
            padding_mask_crop: if given, repaint a crop: the bounding box of the mask with this many
                pixels around it is scaled to `height` x `width`, repainted, and scaled back. A
                small part of a large picture is then painted in full detail.
            height, width: pixels to scale the image to, multiples of `pixels_per_token`; by
                default its own.
            latents: standard normal noise, `(B * n, C, h, w)` in latents.
            guidance_interval: fractions (start, stop) of the steps that `strength` leaves.

        Returns:
            The B * n pictures, prompt by prompt, as `output.images` or `(images,)`,
            of `height` x `width` pixels or, with `padding_mask_crop`, of the image's size. "pt" and
            "np" are float32. The kept part is that of the image, scaled if necessary. If the image
            or the output is latents, the kept part is that of its latents.

        Raises:
            ValueError: an argument cannot work; the message says what to do.
            TypeError: an argument is of a wrong type.
        """
        self.require_parts("a call", "transformer", "scheduler")
        check_number("strength", strength, 0, 1)
        images = read_images(image, self.transformer.config.in_channels)
        masks = read_masks(mask_image)
        height, width = self.size_of(images, height, width)
        request = Request(
            prompt=prompt, negative_prompt=negative_prompt, height=height, width=width,
            **self.settings_of_call(num_inference_steps, guidance_scale, timesteps, sigmas),
            timesteps=timesteps, sigmas=sigmas, guidance_interval=guidance_interval,
            num_images_per_prompt=num_images_per_prompt, eta=eta, generator=generator,
            latents=latents,
            text=TextEmbeddings(
                prompt_embeds, prompt_attention_mask,
                negative_prompt_embeds, negative_prompt_attention_mask,
            ),
            output_type=output_type, return_dict=return_dict,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            max_sequence_length=max_sequence_length,
            cross_attention_kwargs=cross_attention_kwargs, strength=strength,
        )  # fmt: skip
        self.check_inputs(request)
        self.check_images(images, request)
        self.check_masks(masks, images, padding_mask_crop, request)
        size = request.height, request.width
        latent_size = self._latents_shape(request)[2:]
        if self.are_latents(images):
            canvas, repaint = None, latents_to_repaint(masks, *latent_size)
        else:
            canvas = (
                Canvas(images, masks)
                if padding_mask_crop is None
                else Canvas.around_masks(images, masks, *size, padding_mask_crop)
            )
            images, repaint = canvas.pictures(*size), canvas.latents_to_repaint(*latent_size)
        with self.running(request):
            schedule = self.set_timesteps(request)
            text = self.encode_request(request)
            encoded = self.encode_images(images, request)
            noise = self.prepare_noise(request)
            repaint = _rows(repaint, len(encoded)).to(encoded.device)
            start = self.add_noise(encoded, noise, schedule)
            if strength == 1:
                start = torch.where(repaint, noise * initial_scale(self.scheduler), start)
            keep = self.keeping(encoded, noise, repaint, schedule)
            painted = self.denoise(start, schedule, text, request, after_step=keep)
            pictures = self.decode(painted, request)
            if canvas is not None and output_type != "latent":
                pictures = canvas.put_back(pictures)
            return self.output(pictures, request)

    def keeping(
        self,
        encoded: torch.Tensor,
        noise: torch.Tensor,
        repaint: torch.Tensor,
        schedule: torch.Tensor,
    ) -> Callable[[torch.Tensor, int], torch.Tensor]:
        """Make the function that puts back the kept latents after each step.

        Second-order schedulers take a step in two halves. Between the halves the latents are at no
        noise level that `add_noise` knows, so nothing is put back there.

        Args:
            encoded: the image's latents `(B, C, h, w)`.
            noise: `(B, C, h, w)`, standard normal.
            repaint: `(B, 1, h, w)`, False where latents are kept.
            schedule: the timesteps that are taken.
        """

        def keep(latents: torch.Tensor, index: int) -> torch.Tensor:
            to_come = schedule[index + 1 :]
            if len(to_come) > 0 and not getattr(self.scheduler, "state_in_first_order", True):
                return latents
            kept = self.add_noise(encoded, noise, to_come)
            return torch.where(repaint, latents, kept.to(latents.dtype))

        return keep

    def check_masks(
        self,
        masks: torch.Tensor,
        images: torch.Tensor,
        padding_mask_crop: int | None,
        request: Request,
    ) -> None:
        """Refuse masks that do not fit the images, and crops of latents."""
        check_one_each("mask", len(masks), request.num_prompts)
        pixels = self.vae_scale_factor if self.are_latents(images) else 1
        height, width = (pixels * length for length in images.shape[2:])
        if masks.shape[2:] != (height, width):
            raise ValueError(
                f"mask_image is {masks.shape[3]} x {masks.shape[2]} pixels, the image {width} x "
                f"{height}: scale the mask to the image's size."
            )
        if padding_mask_crop is None:
            return
        check_integer("padding_mask_crop", padding_mask_crop, 0)
        if pixels > 1 or request.output_type == "latent":
            raise ValueError(
                "padding_mask_crop cuts out of pictures, not of latents: give a picture as image, "
                "and ask for another output_type than 'latent'."
            )
