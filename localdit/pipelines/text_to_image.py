"""Text to image."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from ..core.schedulers import initial_scale
from .base import LocalDiTBasePipeline
from .request import Generators, Request, StepCallback, TextEmbeddings


class LocalDiTPipeline(LocalDiTBasePipeline):
    """Make pictures from prompts; see `LocalDiTBasePipeline` for the components."""

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
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
        """Make pictures from prompts.

        Args:
            prompt: one prompt or a list of B; lower-cased and stripped, as in training. A prompt of
                more than `max_sequence_length` tokens is cut, with a warning.
            negative_prompt: what to steer away from: one for all prompts, or one per prompt.
            height, width: pixels, multiples of `pixels_per_token` (the autoencoder's pixels per
                latent times the patch size); by default the transformer's `sample_size` in pixels.
            num_inference_steps: denoising steps, at least 1; by default the pipeline's own.
            timesteps, sigmas: a custom schedule instead of a number of steps, if the scheduler
                accepts one.
            guidance_scale: g in `uncond + g * (text - uncond)`; by default the pipeline's own. At 1
                and below, the negative prompt is not computed, which halves the time.
            num_images_per_prompt: pictures per prompt, n.
            eta: noise added at each step by DDIM, in [0, 1]; other schedulers ignore it.
            generator: one for all pictures, or a list of B * n: each picture is then the same as
                if it were made alone.
            latents: standard normal noise to start from, `(B * n, C, h, w)` in latents.
            prompt_embeds, prompt_attention_mask: from `encode_prompt`, instead of `prompt`.
            negative_prompt_embeds, negative_prompt_attention_mask: the same for `negative_prompt`.
            output_type: "pil", "np" (B, H, W, 3) or "pt" (B, 3, H, W) in [0, 1], or "latent".
            return_dict: return an output object rather than a tuple.
            callback_on_step_end: called after each step as `callback(pipeline, step index,
                timestep, tensors)`; it may return tensors that replace the pipeline's.
            callback_on_step_end_tensor_inputs: names of the tensors that the callback gets:
                "latents" and any of the four embeddings and masks.
            max_sequence_length: largest number of tokens in a prompt.
            guidance_interval: fractions (start, stop) of the steps that are guided. The other steps
                leave out the negative prompt and take half the time (Kynkaanniemi et al., 2024).
            cross_attention_kwargs: `{"scale": factor}` multiplies the active LoRA adapters.

        Returns:
            The B * n pictures, prompt by prompt, as `output.images` or `(images,)`.

        Raises:
            ValueError: an argument cannot work; the message says what to do.
            TypeError: an argument is of a wrong type.
        """
        self.require_parts("a call", "transformer", "scheduler")
        default_size = self.transformer.config.sample_size * self.vae_scale_factor
        height = default_size if height is None else height
        width = default_size if width is None else width
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
            cross_attention_kwargs=cross_attention_kwargs,
        )  # fmt: skip
        self.check_inputs(request)
        with self.running(request):
            schedule = self.set_timesteps(request)
            text = self.encode_request(request)
            start = self.prepare_noise(request) * initial_scale(self.scheduler)
            latents = self.denoise(start, schedule, text, request)
            return self.output(self.decode(latents, request), request)
