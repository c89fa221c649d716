"""The arguments that all LocalDiT pipelines share, checked as a whole before any work."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..core.text import NO_ENCODER, check_prompts
from ..errors import Field
from ..sizes import check_size
from . import checks

Generators = torch.Generator | list[torch.Generator] | None
StepCallback = Callable[..., dict[str, Any] | None]

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class TextEmbeddings(NamedTuple):
    """Encoded prompts: embeddings (B, L, C) and masks (B, L), 1 = token and 0 = padding."""

    prompt_embeds: torch.Tensor | None
    prompt_attention_mask: torch.Tensor | None
    negative_prompt_embeds: torch.Tensor | None
    negative_prompt_attention_mask: torch.Tensor | None


@dataclass
class Request:
    """One call of a pipeline; `LocalDiTPipeline.__call__` says what each argument is."""

    prompt: str | list[str] | None
    negative_prompt: str | list[str] | None
    height: int
    width: int
    num_inference_steps: int
    timesteps: list[int] | None
    sigmas: list[float] | None
    guidance_scale: float
    guidance_interval: tuple[float, float]
    num_images_per_prompt: int
    eta: float
    generator: Generators
    latents: torch.Tensor | None
    text: TextEmbeddings
    output_type: str
    return_dict: bool
    callback_on_step_end: StepCallback | None
    callback_on_step_end_tensor_inputs: Sequence[str]
    max_sequence_length: int
    cross_attention_kwargs: dict[str, Any] | None = None

    @property
    def num_prompts(self) -> int:
        """Number of prompts, B."""
        if self.text.prompt_embeds is not None:
            return len(self.text.prompt_embeds)
        return len(self.prompt) if isinstance(self.prompt, list) else 1

    @property
    def batch_size(self) -> int:
        """Number of pictures."""
        return self.num_prompts * self.num_images_per_prompt

    @property
    def guided(self) -> bool:
        """Whether the negative prompt takes part in any step."""
        start, stop = self.guidance_interval
        return self.guidance_scale > 1 and start < stop

    def check_values(self, multiple: int, callback_tensors: list[str]) -> None:
        """Raise for single values that cannot work.

        Args:
            multiple: what height and width must be multiples of, in pixels.
            callback_tensors: the names of tensors that a callback can ask for.
        """
        check_size(Field("height"), self.height, multiple)
        check_size(Field("width"), self.width, multiple)
        checks.check_integer("num_inference_steps", self.num_inference_steps, 1)
        checks.check_integer("num_images_per_prompt", self.num_images_per_prompt, 1)
        checks.check_integer("max_sequence_length", self.max_sequence_length, 1)
        checks.check_number("guidance_scale", self.guidance_scale)
        checks.check_interval("guidance_interval", self.guidance_interval)
        checks.check_one_of("output_type", [self.output_type], OUTPUT_TYPES)
        for name, value in (self.cross_attention_kwargs or {}).items():
            checks.check_one_of("cross_attention_kwargs", [name], ["scale"])
            checks.check_number("the scale in cross_attention_kwargs", value)
        checks.check_one_of(
            "callback_on_step_end_tensor_inputs",
            self.callback_on_step_end_tensor_inputs,
            callback_tensors,
        )

    def check_embeddings(self, channels: int) -> None:
        """Raise for embeddings without their mask or of another shape than `(B, L, channels)`."""
        for name in ("prompt", "negative_prompt"):
            embeds = getattr(self.text, f"{name}_embeds")
            mask = getattr(self.text, f"{name}_attention_mask")
            if (embeds is None) != (mask is None):
                raise ValueError(f"{name}_embeds and {name}_attention_mask go together: give both.")
            if embeds is not None:
                checks.check_tensor(f"{name}_embeds", embeds, (None, None, channels))
                checks.check_tensor(f"{name}_attention_mask", mask, embeds.shape[:2])
        negative = self.text.negative_prompt_embeds
        if negative is not None:
            positive = self.text.prompt_embeds
            length = self.max_sequence_length if positive is None else positive.shape[1]
            checks.check_tensor("negative_prompt_embeds", negative, (None, length, channels))

    def check_prompts(self, can_encode: Callable[[list[str], int], bool]) -> None:
        """Raise for prompts that are missing, given twice, too long, or differ in number.

        Args:
            can_encode: tells whether prompts can be encoded, at a number of tokens.
        """
        if (self.prompt is None) == (self.text.prompt_embeds is None):
            raise ValueError("Give either prompt or prompt_embeds, one of the two.")
        if self.negative_prompt and self.text.negative_prompt_embeds is not None:
            raise ValueError("Give either negative_prompt or negative_prompt_embeds, not both.")
        if self.prompt is not None:
            check_prompts(self.prompt)
        negatives = self.num_prompts
        if self.text.negative_prompt_embeds is not None:
            negatives = len(self.text.negative_prompt_embeds)
        elif self.negative_prompt is not None:
            prompts = check_prompts(self.negative_prompt, "negative_prompt")
            negatives = negatives if isinstance(self.negative_prompt, str) else len(prompts)
        if negatives != self.num_prompts:
            raise ValueError(
                f"There are {self.num_prompts} prompts but {negatives} negative prompts: give one "
                "string for all, or one negative prompt for each prompt."
            )
        if any(not can_encode(prompts, length) for prompts, length in self._to_encode()):
            raise ValueError(NO_ENCODER)

    def _to_encode(self) -> Iterator[tuple[list[str], int]]:
        """The prompts that no embeddings are given for, each list with its number of tokens."""
        length = self.max_sequence_length
        if self.prompt is not None:
            yield check_prompts(self.prompt), length
        if self.text.prompt_embeds is not None:
            length = self.text.prompt_embeds.shape[1]
        if self.guided and self.text.negative_prompt_embeds is None:
            yield check_prompts(self.negative_prompt or "", "negative_prompt"), length

    def check_noise(self, latents_shape: tuple[int, ...]) -> None:
        """Raise for generators of a wrong number and for latents of another shape."""
        checks.check_generator(self.generator, self.batch_size)
        if self.latents is not None:
            checks.check_tensor("latents", self.latents, latents_shape)
