"""Text, image and mask to image."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from ..core.diffusion import initial_scale
from .canvas import Canvas, latents_to_repaint
from .checks import check_integer, check_number, check_one_each
from .from_images import FromImagesPipeline
from .image_inputs import read_images, read_masks
from .request import Generators, Request, StepCallback, TextEmbeddings


class LocalDiTInpaintPipeline(FromImagesPipeline):
    """Repaint parts of pictures to follow prompts; the rest is kept, to the pixel.

    After each step, what is to be kept is put back with the noise of that step (RePaint, Lugmayr et
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
        num_inference_steps: int = 20,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 7.0,
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

        Arguments that are not listed are those of `LocalDiTPipeline`.

        Args:
            prompt: one prompt or a list of B: what the whole picture is to show.
            image: one image for all prompts or a list of B: PIL images, arrays `(H, W, 3)` or
                tensors `(3, H, W)` in [0, 1], or latents as `output_type="latent"` returns them.
            mask_image: one mask for all prompts or a list of B, of the image's size in pixels: PIL
                images, arrays `(H, W)` or tensors `(1, H, W)` in [0, 1]. White (from 0.5 on) is
                repainted. Values between 0 and 1 blend old and new, so that a blurred mask hides
                the seam; where it is 0, the picture stays as it was.
            strength: how much to change what is repainted, in [0, 1]: as in image to image, but
                that at 1 it starts from noise alone.
            padding_mask_crop: if given, only the surroundings of the mask are worked on: its
                bounding box with so many pixels around it, scaled to `height` x `width` and
                afterwards back. So a small part of a large picture is painted in full detail.
            negative_prompt: what to steer away from: one for all prompts, or one for each.
            height, width: pixels to scale the image to, multiples of 16; by default its own.
            latents: standard normal noise, `(B * n, C, height / 8, width / 8)`.
            guidance_interval: fractions (start, stop) of the steps that are taken.

        Returns:
            The B * n pictures, those of the first prompt first, as `output.images` or `(images,)`,
            of `height` x `width` pixels or, with `padding_mask_crop`, of the image's size. "pt" and
            "np" are float32. What is kept is the image itself, scaled if need be; where latents
            were given or are asked for, it is its latents.

        Raises:
            ValueError: an argument cannot work; the message says what to do.
            TypeError: an argument is of a wrong type.
        """
        check_number("strength", strength, 0, 1)
        images = read_images(image, self.transformer.config.in_channels)
        masks = read_masks(mask_image)
        height, width = self.size_of(images, height, width)
        request = Request(
            prompt=prompt, negative_prompt=negative_prompt, height=height, width=width,
            num_inference_steps=num_inference_steps, timesteps=timesteps, sigmas=sigmas,
            guidance_scale=guidance_scale, guidance_interval=guidance_interval,
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
            cross_attention_kwargs=cross_attention_kwargs,
        )  # fmt: skip
        self.check_inputs(request)
        self.check_images(images, request)
        self.check_masks(masks, images, padding_mask_crop, request)
        size = request.height, request.width
        canvas = None
        if not self.are_latents(images):
            canvas = (
                Canvas.scaled(images, masks, *size)
                if padding_mask_crop is None
                else Canvas.around_masks(images, masks, *size, padding_mask_crop)
            )
            images, masks = canvas.part(*size)
        self.set_timesteps(request)
        schedule = self.get_timesteps(strength)
        text = self.encode_request(request)
        encoded = self.encode_images(images, request)
        noise = self.prepare_noise(request)
        repaint = latents_to_repaint(masks, self.vae_scale_factor, len(encoded)).to(encoded.device)
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
        """Make the function that puts back, after each step, the latents that are kept.

        Schedulers of second order take a step in two halves. In between, the latents are at no
        level of noise that `add_noise` knows, and what is kept follows from the step's beginning.

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
        """Refuse masks that do not fit the images, and what `padding_mask_crop` cannot do.

        Raises:
            ValueError: it is so; the message says what to do.
        """
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
