"""Text and image to image."""

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from .base import LocalDiTBasePipeline
from .checks import check_number
from .image_inputs import read_images, scale_images
from .request import Generators, Request, StepCallback, TextEmbeddings
from .schedules import add_noise

logger = logging.getLogger(__name__)


class LocalDiTImg2ImgPipeline(LocalDiTBasePipeline):
    """Change pictures to follow prompts (SDEdit, Meng et al., 2022).

    See `LocalDiTBasePipeline` for the components; `LocalDiTImg2ImgPipeline(**pipe.components)`
    shares those of another pipeline.
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: Any = None,
        strength: float = 0.8,
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
    ) -> ImagePipelineOutput | tuple[Any]:
        """Change pictures to follow prompts.

        Arguments that are not listed are those of `LocalDiTPipeline`.

        Args:
            prompt: one prompt or a list of B.
            image: one image for all prompts or a list of B: PIL images, arrays `(H, W, 3)` or
                tensors `(3, H, W)` in [0, 1], or latents as `output_type="latent"` returns them.
            strength: how much to change, in [0, 1]: the last `int(num_inference_steps * strength)`
                timesteps are taken, from the encoded image with the noise of the first of them.
                At 0 the image comes back as the autoencoder renders it.
            negative_prompt: what to steer away from: one for all prompts, or one for each.
            height, width: pixels to scale the image to, multiples of 16; by default its own.
            latents: standard normal noise to add, `(B * n, C, height / 8, width / 8)`.
            guidance_interval: fractions (start, stop) of the steps that are taken.

        Returns:
            The B * n pictures, those of the first prompt first, as `output.images` or `(images,)`.

        Raises:
            ValueError: an argument cannot work; the message says what to do.
            TypeError: an argument is of a wrong type.
        """
        check_number("strength", strength, 0, 1)
        images = read_images(image, self.transformer.config.in_channels)
        pixels = self.vae_scale_factor if self._are_latents(images) else 1
        request = Request(
            prompt=prompt,
            negative_prompt=negative_prompt,
            height=pixels * images.shape[2] if height is None else height,
            width=pixels * images.shape[3] if width is None else width,
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            sigmas=sigmas,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            num_images_per_prompt=num_images_per_prompt,
            eta=eta,
            generator=generator,
            latents=latents,
            text=TextEmbeddings(
                prompt_embeds,
                prompt_attention_mask,
                negative_prompt_embeds,
                negative_prompt_attention_mask,
            ),
            output_type=output_type,
            return_dict=return_dict,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            max_sequence_length=max_sequence_length,
        )
        self.check_inputs(request)
        self._check_images(images, request)
        self.set_timesteps(request)
        schedule = self.get_timesteps(strength)
        text = self.encode_request(request)
        start = self.prepare_latents(images, schedule, request)
        return self.decode(self.denoise(start, schedule, text, request), request)

    def get_timesteps(self, strength: float) -> torch.Tensor:
        """Return the last `int(steps * strength)` steps of the scheduler's timesteps."""
        timesteps, order = self.scheduler.timesteps, self.scheduler.order
        steps = math.ceil(len(timesteps) / order)
        kept = int(steps * strength)
        if strength > 0 and kept == 0:
            logger.warning(
                "Strength %g of %d steps is less than one step: no step is taken.", strength, steps
            )
        first = (steps - kept) * order
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(first)
        return timesteps[first:]

    def prepare_latents(
        self, images: torch.Tensor, timesteps: torch.Tensor, request: Request
    ) -> torch.Tensor:
        """Encode images `(N, 3, H, W)` and add the noise of the first timestep, if there is one.

        Returns:
            Latents `(B, C, height / 8, width / 8)`, one row for each picture to be made.
        """
        latents = self.encode_images(images, request)
        if len(timesteps) == 0:
            return latents
        noise = self.prepare_noise(request)
        return add_noise(self.scheduler, latents, noise, timesteps[:1])

    def encode_images(self, images: torch.Tensor, request: Request) -> torch.Tensor:
        """Draw latents `(B, C, height / 8, width / 8)` of images `(N, 3, H, W)` in [0, 1].

        Each image is encoded once; each picture then draws its own sample of the posterior. Latents
        are passed through.
        """
        repeats = request.batch_size // len(images)
        images = images.to(self._execution_device)
        if self._are_latents(images):
            return images.repeat_interleave(repeats, dim=0)
        images = scale_images(images, request.height, request.width)
        if self.image_processor.config.do_normalize:
            images = self.image_processor.normalize(images)
        parameters = self.posterior_parameters(images, request).repeat_interleave(repeats, dim=0)
        latents = DiagonalGaussianDistribution(parameters).sample(request.generator)
        return (latents - (self.vae.config.shift_factor or 0)) * self.vae.config.scaling_factor

    def _are_latents(self, images: torch.Tensor) -> bool:
        return images.shape[1] == self.transformer.config.in_channels

    def _check_images(self, images: torch.Tensor, request: Request) -> None:
        if len(images) not in (1, request.num_prompts):
            raise ValueError(
                f"There are {len(images)} images but {request.num_prompts} prompts: give one image "
                "for all, or one for each prompt."
            )
        size = (request.height // self.vae_scale_factor, request.width // self.vae_scale_factor)
        if self._are_latents(images) and images.shape[2:] != size:
            raise ValueError(
                f"The latents given as image are {tuple(images.shape[2:])}, but height and width "
                f"need {size}. Latents cannot be scaled: leave height and width out."
            )
