"""Image to image, and the stages of all pipelines that start from images."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from ..core.schedulers import add_noise
from .base import CALLS, LocalDiTBasePipeline
from .image_inputs import read_images, scale_images
from .request import (
    Generators,
    Request,
    StepCallback,
    TextEmbeddings,
    check_number,
    check_one_each,
)

logger = logging.getLogger(__name__)


class FromImagesPipeline(LocalDiTBasePipeline):
    """The stages from given images to the latents that sampling starts from."""

    def size_of(
        self, images: torch.Tensor, height: int | None, width: int | None
    ) -> tuple[int, int]:
        """Return the pictures' height and width in pixels: as given, or else the images'."""
        pixels = self.vae_scale_factor if self.are_latents(images) else 1
        return (
            pixels * images.shape[2] if height is None else height,
            pixels * images.shape[3] if width is None else width,
        )

    def are_latents(self, images: torch.Tensor) -> bool:
        """Return whether images `(N, C, H, W)` are latents; what has 3 channels is a picture."""
        return images.shape[1] == self.transformer.config.in_channels != 3

    def check_images(self, images: torch.Tensor, request: Request) -> None:
        """Refuse a wrong number of images, latents of a wrong size, and pictures without a VAE."""
        if not self.are_latents(images):
            self.require_parts("a picture as image", "vae")
        check_one_each("image", len(images), request.num_prompts)
        size = (request.height // self.vae_scale_factor, request.width // self.vae_scale_factor)
        if self.are_latents(images) and images.shape[2:] != size:
            raise ValueError(
                f"The latents given as image are {tuple(images.shape[2:])}, but height and width "
                f"require {size}. Latents cannot be scaled: leave height and width out."
            )

    def set_timesteps(self, request: Request) -> torch.Tensor:
        """Set the timesteps, let the scheduler begin where the strength says, return the rest."""
        schedule = super().set_timesteps(request)
        if request.strength > 0 and len(schedule) == 0:
            logger.warning(
                "Strength %g of %d steps is less than one step: no step is taken.",
                request.strength,
                request.num_inference_steps,
            )
        skipped = len(self.scheduler.timesteps) - len(schedule)
        few = request.num_inference_steps < 12  # from then on, less than one of 256 shades
        if type(self.scheduler).__name__ == "PNDMScheduler" and skipped and few:
            logger.warning(
                "PNDMScheduler ends a step before the noise is gone if it starts from a picture: "
                "take more steps, or use another scheduler, such as DDIMScheduler."
            )
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(skipped)
        return schedule

    def encode_images(self, images: torch.Tensor, request: Request) -> torch.Tensor:
        """Encode images `(N, 3, H, W)` in [0, 1] as latents `(B, C, h, w)`.

        Each image is encoded once, and each picture draws a sample of the posterior. Images that
        are latents are returned as they are.
        """
        repeats = request.batch_size // len(images)
        images = images.to(self._execution_device)
        if self.are_latents(images):
            return images.repeat_interleave(repeats, dim=0)
        images = scale_images(images, request.height, request.width)
        if self.image_processor.config.do_normalize:
            images = self.image_processor.normalize(images)
        with CALLS.turn(self.vae):
            latents = self.latent_space.encode(
                images, sample=True, generator=request.generator, repeats=repeats
            )
        self._call.watch("The autoencoder (VAE), encoding,", latents)
        return latents

    def add_noise(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Add the noise of the first timestep to come to latents `(B, C, h, w)`, if there is one.

        The scheduler must be at that timestep: schedulers with sigmas use their step index instead
        of the timestep.
        """
        if len(timesteps) == 0:
            return latents
        return add_noise(self.scheduler, latents, noise, timesteps[:1])


class LocalDiTImg2ImgPipeline(FromImagesPipeline):
    """Change pictures to follow prompts (SDEdit, Meng et al., 2022).

    See `LocalDiTBasePipeline` for the components; `LocalDiTImg2ImgPipeline.from_pipe(pipe)` shares
    those of another pipeline.
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
        """Change pictures to follow prompts.

        The other arguments are those of `LocalDiTPipeline`.

        Args:
            image: one image for all prompts or a list of B: PIL images, arrays `(H, W, 3)` or
                tensors `(3, H, W)` in [0, 1], or latents as `output_type="latent"` returns them.
            strength: how much to change, in [0, 1]. The last `int(num_inference_steps * strength)`
                timesteps are taken, starting from the encoded image with the noise of the first of
                them; the schedulers of few-step models (LCM, TCD, flow-matching LCM) take all steps
                from the noise level of the strength. At 0 the image is only encoded and decoded.
            height, width: pixels to scale the image to, multiples of `pixels_per_token`; by
                default its own.
            latents: standard normal noise to add, `(B * n, C, h, w)` in latents.
            guidance_interval: fractions (start, stop) of the steps that `strength` leaves.

        Returns:
            The B * n pictures, prompt by prompt, as `output.images` or `(images,)`.

        Raises:
            ValueError: an argument cannot work; the message says what to do.
            TypeError: an argument is of a wrong type.
        """
        self.require_parts("a call", "transformer", "scheduler")
        check_number("strength", strength, 0, 1)
        images = read_images(image, self.transformer.config.in_channels)
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
        with self.running(request):
            schedule = self.set_timesteps(request)
            text = self.encode_request(request)
            encoded = self.encode_images(images, request)
            start = self.add_noise(encoded, self.prepare_noise(request), schedule[:1])
            latents = self.denoise(start, schedule, text, request)
            return self.output(self.decode(latents, request), request)
