"""From text to embeddings, prepared as the captions were in training."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from .prompt_cache import PromptCache

logger = logging.getLogger(__name__)

# Far beyond 120 tokens of any language; tokenising megabytes takes seconds and gigabytes.
MAX_PROMPT_CHARACTERS = 10_000

NO_ENCODER = (
    "This pipeline has no tokenizer or no text encoder, and not all of these prompts were encoded "
    "before: give prompt_embeds and prompt_attention_mask and, with a guidance_scale above 1, the "
    "negative ones too; or set pipe.text_encoder (and pipe.tokenizer) again."
)


def check_prompts(prompt: str | list[str] | None, name: str = "prompt") -> list[str]:
    """Return the prompts as a list, having checked that each can be tokenised.

    Args:
        prompt: one prompt or a list of them. An empty string is a prompt, an empty list is not.
        name: what the caller calls it, for the error message.

    Raises:
        TypeError: something other than `str` was given.
        ValueError: the list is empty, or a prompt is longer than `MAX_PROMPT_CHARACTERS`.
    """
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list):
        raise TypeError(f"{name} must be a str or a list of str, got {type(prompt).__name__}.")
    if not prompts:
        raise ValueError(f"{name} is an empty list: give at least one prompt.")
    for index, text in enumerate(prompts):
        which = name if isinstance(prompt, str) else f"{name}[{index}]"
        if not isinstance(text, str):
            raise TypeError(f"{which} must be a str, got {type(text).__name__}.")
        if len(text) > MAX_PROMPT_CHARACTERS:
            raise ValueError(
                f"{which} has {len(text)} characters, more than the {MAX_PROMPT_CHARACTERS} that "
                "are accepted. Shorten it: the model reads little more than a hundred words."
            )
    return prompts


def preprocess(prompt: str) -> str:
    """Lower-case and strip a prompt, as was done with the captions in training."""
    return prompt.lower().strip()


def tokenize(
    tokenizer: Any, prompts: list[str], max_length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Preprocess prompts and tokenise them, always padded to the full length.

    The fixed length makes a prompt's embedding independent of what else is in the batch. A prompt
    that does not fit is cut, with a warning that quotes what was cut.

    Args:
        tokenizer: a Transformers tokenizer.
        prompts: N prompts, as checked by `check_prompts`.
        max_length: number of tokens L, the end-of-sequence token included.

    Returns:
        Token ids and attention mask (1 = token, 0 = padding), each `(N, L)` and int64.
    """
    texts = [preprocess(prompt) for prompt in prompts]
    tokens = tokenizer(
        texts,
        padding="max_length",
        max_length=max_length,
        truncation=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    for text, mask in zip(texts, tokens.attention_mask, strict=True):
        if mask.all():
            _warn_if_cut(tokenizer, text, max_length)
    return tokens.input_ids, tokens.attention_mask


def _warn_if_cut(tokenizer: Any, text: str, max_length: int) -> None:
    ids = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
    kept = max_length - tokenizer.num_special_tokens_to_add()
    if len(ids) > kept:
        logger.warning(
            "A prompt of %d tokens was cut to the first %d; left out: %r",
            len(ids),
            kept,
            tokenizer.decode(ids[kept:]),
        )


class PromptEncodingMixin:
    """`encode_prompt` for a pipeline with a tokenizer, a text encoder and a transformer."""

    tokenizer: Any
    text_encoder: Any
    transformer: Any
    prompt_cache: PromptCache
    _execution_device: torch.device
    maybe_free_model_hooks: Callable[[], None]

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = "",
        num_images_per_prompt: int = 1,
        device: torch.device | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        max_sequence_length: int = 120,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Encode prompts, or prepare embeddings that are given, one row for each picture.

        Args:
            prompt: B prompts; None with `prompt_embeds`.
            do_classifier_free_guidance: whether negative embeddings are wanted.
            negative_prompt: one for all prompts or one for each; None is the empty prompt.
            num_images_per_prompt: how often each row is repeated, n.
            device: where to put the results; by default where the pipeline computes.
            prompt_embeds, negative_prompt_embeds: encoded before, `(B, L, C)`.
            prompt_attention_mask, negative_prompt_attention_mask: their masks, `(B, L)`.
            max_sequence_length: tokens L that a prompt is padded or cut to.

        Returns:
            Embeddings `(B * n, L, C)` in the transformer's dtype and masks `(B * n, L)` of the
            prompts, then of the negative prompts (None and None without guidance).

        Prompts are encoded once: `prompt_cache` keeps what they became, for later calls.
        """
        device = device or self._execution_device
        model = self.transformer if self.transformer is not None else self.text_encoder

        if prompt_embeds is None or prompt_attention_mask is None:
            prompt_embeds, prompt_attention_mask = self._encode(
                check_prompts(prompt), max_sequence_length, device
            )
        rows, length, _ = prompt_embeds.shape
        repeats = num_images_per_prompt
        dtype = prompt_embeds.dtype if model is None else model.dtype
        prompt_embeds = prompt_embeds.to(device, dtype).repeat_interleave(repeats, dim=0)
        prompt_attention_mask = prompt_attention_mask.to(device).repeat_interleave(repeats, dim=0)
        if not do_classifier_free_guidance:
            negative_prompt_embeds, negative_prompt_attention_mask = None, None
        else:
            if negative_prompt_embeds is None or negative_prompt_attention_mask is None:
                prompts = check_prompts(negative_prompt or "", "negative_prompt")
                negative_prompt_embeds, negative_prompt_attention_mask = self._encode(
                    prompts, length, device
                )
                if len(prompts) not in (1, rows):
                    raise ValueError(f"{rows} prompts but {len(prompts)} negative prompts.")
                repeats *= rows // len(prompts)
            negative_prompt_embeds = negative_prompt_embeds.to(device, dtype)
            negative_prompt_embeds = negative_prompt_embeds.repeat_interleave(repeats, dim=0)
            negative_prompt_attention_mask = negative_prompt_attention_mask.to(device)
            negative_prompt_attention_mask = negative_prompt_attention_mask.repeat_interleave(
                repeats, dim=0
            )
        # The one return statement, of names that are arguments of a call: Diffusers' tests read it.
        return (
            prompt_embeds,
            prompt_attention_mask,
            negative_prompt_embeds,
            negative_prompt_attention_mask,
        )

    def release_text_encoder(self) -> None:
        """Drop the text encoder and give its memory back; prompts encoded before go on working.

        They are in `prompt_cache`, and so do not outlast the process. Any other prompt raises
        `ValueError` from then on, until `text_encoder` is set again. Memory comes back only when
        nothing else holds the encoder: another pipeline of the same components, or a variable.
        """
        from ..machine import give_memory_back

        self.text_encoder = None
        # Offloading holds each model in the hook of the next one; this sets the hooks up anew.
        self.maybe_free_model_hooks()
        give_memory_back()

    def _encode(
        self, prompts: list[str], max_length: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """States `(N, L, C)` of N prompts, and their mask `(N, L)`.

        Each prompt is encoded by itself: what it becomes depends neither on the others nor on
        which of them are in the cache.
        """
        import torch

        if self.tokenizer is None:
            raise ValueError(NO_ENCODER)
        input_ids, mask = tokenize(self.tokenizer, prompts, max_length)
        self.prompt_cache.serve(self.text_encoder, device)
        keys = _keys(input_ids, mask)
        states: dict[bytes, torch.Tensor] = {}
        for row, key in enumerate(keys):
            if key not in states:
                one = slice(row, row + 1)
                states[key] = self._states_of(key, input_ids[one], mask[one], device)
        return torch.stack([states[key] for key in keys]), mask.to(device)

    def _states_of(
        self, key: bytes, input_ids: torch.Tensor, mask: torch.Tensor, device: torch.device
    ) -> torch.Tensor:
        """States `(L, C)` of one prompt, from the cache where nothing can tell the difference."""
        import torch

        encoder = self.text_encoder
        learns = encoder is not None and (
            encoder.training  # drops other channels each time
            or (torch.is_grad_enabled() and any(p.requires_grad for p in encoder.parameters()))
        )
        cached = None if learns else self.prompt_cache.get(key)
        if cached is not None:
            return cached.to(device)
        if encoder is None:
            raise ValueError(NO_ENCODER)
        states = encoder(input_ids.to(device), attention_mask=mask.to(device))[0][0]
        if not encoder.training:
            self.prompt_cache.put(key, states)
        return states

    def _can_encode(self, prompts: list[str], max_length: int) -> bool:
        """Whether there is what it takes: a tokenizer, and a text encoder or the states cached."""
        if self.tokenizer is None or self.text_encoder is not None:
            return self.tokenizer is not None
        keys = _keys(*tokenize(self.tokenizer, prompts, max_length))
        return all(self.prompt_cache.get(key) is not None for key in keys)


def _keys(input_ids: torch.Tensor, mask: torch.Tensor) -> list[bytes]:
    """What tells prompts apart: their tokens, padding included, so that no tokenizer matters."""
    return [
        ids.numpy().tobytes() + keep.numpy().tobytes()
        for ids, keep in zip(input_ids, mask, strict=True)
    ]
