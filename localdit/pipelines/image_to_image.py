"""Text and image to image."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from .checks import check_number
from .from_images import FromImagesPipeline
from .image_inputs import read_images
from .request import Generators, Request, StepCallback, TextEmbeddings


class LocalDiTImg2ImgPipeline(FromImagesPipeline):
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
        cross_attention_kwargs: dict[str, Any] | None = None,
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
        self.set_timesteps(request)
        schedule = self.get_timesteps(strength)
        text = self.encode_request(request)
        encoded = self.encode_images(images, request)
        start = self.add_noise(encoded, self.prepare_noise(request), schedule[:1])
        latents = self.denoise(start, schedule, text, request)
        return self.output(self.decode(latents, request), request)
