"""One step's prediction: classifier-free guidance, conditions, step caches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from ..models.transformer import LocalDiTTransformer2DModel
from .guidance import DenoiserText
from .schedules import scale_input


class PredictionMixin:
    """`predict` for a pipeline with a transformer and a scheduler, and what it depends on."""

    transformer: LocalDiTTransformer2DModel
    scheduler: Any
    vae_scale_factor: int
    _denoiser_text: DenoiserText
    _guidance_scale = 1.0
    _cross_attention_kwargs: dict[str, Any] | None = None
    _within_interval = True
    _latest_context: str | None = None
    _current_timestep: torch.Tensor | None = None

    @property
    def guidance_scale(self) -> float:
        """Weight g of `uncond + g * (text - uncond)`; a callback may set `_guidance_scale`."""
        return self._guidance_scale

    @property
    def cross_attention_kwargs(self) -> dict[str, Any] | None:
        """What the transformer is told beside its inputs: the scale of LoRA adapters."""
        return self._cross_attention_kwargs

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the negative prompt takes part in the present step.

        It does where the guidance scale exceeds 1, within the guidance interval.
        """
        return self._guidance_scale > 1 and self._within_interval

    @property
    def current_timestep(self) -> torch.Tensor | None:
        """The timestep of the step that is being computed; None outside of a call."""
        return self._current_timestep

    @contextmanager
    def denoising(self) -> Iterator[None]:
        """Begin and end a run of steps with nothing left over from another one."""
        self._reset_between_steps()
        try:
            yield
        finally:
            self._reset_between_steps()
            self._within_interval = True
            self._current_timestep = None

    def _reset_between_steps(self) -> None:
        """Forget what is carried from step to step: joined text, and a step cache's states."""
        self._denoiser_text.clear()
        self._latest_context = None
        self.transformer._reset_stateful_cache()

    def predict(
        self,
        timestep: torch.Tensor,
        latents: torch.Tensor,
        prompt_embeds: torch.Tensor,
        prompt_attention_mask: torch.Tensor,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predict what the scheduler steps with, guided where the guidance scale exceeds 1.

        Classifier-free guidance (Ho and Salimans, 2022) as `uncond + g * (text - uncond)`, both
        halves in one batch, the negative prompts first; within the guidance interval.
        """
        guided = self.do_classifier_free_guidance
        pairs = [(prompt_embeds, prompt_attention_mask)]
        if guided:
            if negative_prompt_embeds is None or negative_prompt_attention_mask is None:
                raise ValueError(
                    "The guidance scale was raised above 1 during sampling, but the negative "
                    "prompt was not encoded: start with a guidance_scale above 1."
                )
            latents = torch.cat([latents, latents])
            pairs.insert(0, (negative_prompt_embeds, negative_prompt_attention_mask))
        embeds, mask = self._denoiser_text(*pairs)
        with self._cache_context("cond_uncond" if guided else "cond"):
            prediction = self.transformer(
                scale_input(self.scheduler, latents, timestep),
                encoder_hidden_states=embeds,
                encoder_attention_mask=mask,
                timestep=timestep.to(latents.device).expand(len(latents)),
                added_cond_kwargs=self._micro_conditions(latents),
                cross_attention_kwargs=self.cross_attention_kwargs,
                return_dict=False,
            )[0]
        if guided:
            uncond, text = prediction.chunk(2)
            prediction = uncond + self.guidance_scale * (text - uncond)
        if prediction.shape[1] == 2 * latents.shape[1]:  # the second half is a learned variance
            prediction = prediction.chunk(2, dim=1)[0]
        return prediction

    def _cache_context(self, name: str) -> AbstractContextManager[None]:
        """Tell a step cache which kind of call this is; what it kept of another kind is of another
        batch size, and of steps ago."""
        if name != self._latest_context:
            self.transformer._reset_stateful_cache()
            self._latest_context = name
        return self.transformer.cache_context(name)

    def _micro_conditions(self, latents: torch.Tensor) -> dict[str, torch.Tensor | None]:
        if not self.transformer.use_additional_conditions:
            return {"resolution": None, "aspect_ratio": None}
        height, width = (self.vae_scale_factor * length for length in latents.shape[2:])
        # One row for the whole batch, since FasterCache leaves half of it out at times. float32
        # whatever the latents are: the embedding computes in it, and bfloat16 would round.
        resolution = torch.tensor([[height, width]], dtype=torch.float32, device=latents.device)
        aspect_ratio = torch.tensor([[width / height]], dtype=torch.float32, device=latents.device)
        return {"resolution": resolution, "aspect_ratio": aspect_ratio}
