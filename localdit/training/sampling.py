"""Pictures of fixed prompts and seeds, to see how training goes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import SchedulerMixin
    from PIL import Image

    from localdit.core.parts import Encoders
    from localdit.models import LocalDiTTransformer2DModel


class PromptPictures:
    """Draws the same prompts from the same noise each time; processes share the prompts out.

    The prompts are encoded once, so the text encoder is not needed afterwards.

    Args:
        prompts: of all processes.
        encoders: to encode this process's prompts with, and to decode latents.
        max_length: text tokens a prompt is cut at.
        seed: picture i starts from noise of `seed + i`.
        guidance_scale, num_inference_steps: of sampling.
        rank, num_processes: this process draws the prompts `rank`, `rank + num_processes`, ...
    """

    def __init__(
        self,
        prompts: list[str],
        encoders: Encoders,
        max_length: int,
        seed: int,
        guidance_scale: float,
        num_inference_steps: int = 20,
        rank: int = 0,
        num_processes: int = 1,
    ) -> None:
        from localdit.pipelines import LocalDiTPipeline

        self.indices = list(range(len(prompts)))[rank::num_processes]
        self.seed = seed
        self.guidance_scale = guidance_scale
        self.num_inference_steps = num_inference_steps
        self.vae = encoders.vae
        self.embeddings = []
        pipeline = LocalDiTPipeline(*encoders, transformer=None, scheduler=None)  # type: ignore[arg-type]
        with torch.no_grad():
            for index in self.indices:
                embeddings = pipeline.encode_prompt(
                    prompts[index],
                    device=encoders.text_encoder.device,
                    max_sequence_length=max_length,
                )
                self.embeddings.append(embeddings)

    def draw(
        self, transformer: LocalDiTTransformer2DModel, scheduler: SchedulerMixin, size: int
    ) -> list[tuple[int, Image.Image]]:
        """This process's pictures of `size` x `size` pixels, each with its prompt's number."""
        from localdit.pipelines import LocalDiTPipeline

        self.vae.to(transformer.device)
        pipeline = LocalDiTPipeline(None, None, self.vae, transformer, scheduler)
        pipeline.set_progress_bar_config(disable=True)
        pictures = []
        for index, (text, mask, negative, negative_mask) in zip(
            self.indices, self.embeddings, strict=True
        ):
            output = pipeline(
                prompt_embeds=text,
                prompt_attention_mask=mask,
                negative_prompt_embeds=negative,
                negative_prompt_attention_mask=negative_mask,
                height=size,
                width=size,
                guidance_scale=self.guidance_scale,
                num_inference_steps=self.num_inference_steps,
                generator=torch.Generator("cpu").manual_seed(self.seed + index),
                return_dict=False,
            )
            pictures.append((index, output[0][0]))
        return pictures
