"""One call of a pipeline: its arguments, their checks before any work, and its state."""

import copy
import math
import reprlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from ..config import LARGEST_WEIGHT, is_finite_number
from ..core.text import NO_ENCODER, check_prompts, cut_padding
from ..errors import Field, FieldValueError, Setting
from ..models.text_projections import reuse_projections
from ..sizes import check_size

Generators = torch.Generator | list[torch.Generator] | None
StepCallback = Callable[..., dict[str, Any] | None]

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class TextEmbeddings(NamedTuple):
    """Encoded prompts: embeddings `(B, L, C)` and masks `(B, L)`, 1 = token and 0 = padding."""

    prompt_embeds: torch.Tensor | None
    prompt_attention_mask: torch.Tensor | None
    negative_prompt_embeds: torch.Tensor | None
    negative_prompt_attention_mask: torch.Tensor | None

    def check(
        self, prompt: Any, negative_prompt: Any, channels: int | None, max_sequence_length: int
    ) -> None:
        """Refuse embeddings without a mask, beside a prompt, or not `(B, L, channels)`.

        Each row of a mask needs a token; without one, padding would weigh as much as text.
        L is `max_sequence_length` for negative embeddings beside prompts.
        """
        if (prompt is None) == (self.prompt_embeds is None):
            raise ValueError("Give either prompt or prompt_embeds: exactly one of them is needed.")
        if negative_prompt and self.negative_prompt_embeds is not None:
            raise ValueError("Give either negative_prompt or negative_prompt_embeds, not both.")
        for name in ("prompt", "negative_prompt"):
            embeds = getattr(self, f"{name}_embeds")
            mask = getattr(self, f"{name}_attention_mask")
            if (embeds is None) != (mask is None):
                raise ValueError(f"{name}_embeds and {name}_attention_mask go together: give both.")
            if embeds is not None:
                check_tensor(f"{name}_embeds", embeds, (None, None, channels))
                check_mask(f"{name}_attention_mask", mask, embeds.shape[:2])
                if not len(mask) or not mask.any(dim=1).all():
                    raise ValueError(
                        f"{name}_attention_mask of shape {tuple(mask.shape)} must have at least "
                        "one row, and a 1 in every row."
                    )
        positive, negative = self.prompt_embeds, self.negative_prompt_embeds
        if negative is not None:
            length = max_sequence_length if positive is None else positive.shape[1]
            check_tensor("negative_prompt_embeds", negative, (None, length, channels))


@dataclass
class Request:
    """One call of a pipeline; `LocalDiTPipeline.__call__` describes the arguments."""

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
    strength: float = 1.0

    @property
    def custom_schedule(self) -> dict[str, Any]:
        """The custom timesteps or sigmas by name, if any."""
        given = {"timesteps": self.timesteps, "sigmas": self.sigmas}
        return {name: values for name, values in given.items() if values is not None}

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
    def callback_inputs(self) -> Sequence[str]:
        """Names of the tensors that the callback gets. Diffusers' own callbacks name theirs."""
        callback = self.callback_on_step_end
        if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
            return callback.tensor_inputs
        return self.callback_on_step_end_tensor_inputs

    @property
    def guided(self) -> bool:
        """Whether the negative prompt takes part in any step."""
        start, stop = self.guidance_interval
        return self.guidance_scale > 1 and start < stop

    def guided_steps(self, steps: int) -> range:
        """The guided steps of `steps`: from `int(start * steps)` to `int(stop * steps)`."""
        start, stop = self.guidance_interval
        return range(int(start * steps), int(stop * steps))

    def check_values(self, multiple: int, callback_tensors: list[str]) -> None:
        """Refuse single values that cannot work.

        Height and width are multiples of `multiple` pixels. A callback can ask for the tensors
        named in `callback_tensors`.
        """
        check_size(Field("height"), self.height, multiple)
        check_size(Field("width"), self.width, multiple)
        check_integer("num_inference_steps", self.num_inference_steps, 1)
        check_integer("num_images_per_prompt", self.num_images_per_prompt, 1)
        check_integer("max_sequence_length", self.max_sequence_length, 1)
        check_number("guidance_scale", self.guidance_scale, -LARGEST_WEIGHT, LARGEST_WEIGHT)
        check_number("eta", self.eta, 0, 1)
        check_interval("guidance_interval", self.guidance_interval)
        check_one_of("output_type", [self.output_type], OUTPUT_TYPES)
        if not isinstance(self.cross_attention_kwargs, dict | None):
            raise TypeError(
                "cross_attention_kwargs must be a dict or None, got "
                f"{type(self.cross_attention_kwargs).__name__}."
            )
        for name, value in (self.cross_attention_kwargs or {}).items():
            check_one_of("cross_attention_kwargs", [name], ["scale"])
            named = "the scale in cross_attention_kwargs"
            check_number(named, value, -LARGEST_WEIGHT, LARGEST_WEIGHT)
        if not (self.callback_on_step_end is None or callable(self.callback_on_step_end)):
            raise TypeError(
                "callback_on_step_end must be a function or None, got "
                f"{type(self.callback_on_step_end).__name__}."
            )
        check_one_of("callback_on_step_end_tensor_inputs", self.callback_inputs, callback_tensors)

    def check_prompts(self, can_encode: Callable[[list[str], int], bool]) -> None:
        """Refuse prompts that differ in number, or cannot be encoded.

        `can_encode(prompts, tokens)` returns whether prompts can be encoded at that length.
        """
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
        """Yield the prompts without embeddings, each list with its number of tokens."""
        length = self.max_sequence_length
        if self.prompt is not None:
            yield check_prompts(self.prompt), length
        if self.text.prompt_embeds is not None:
            length = self.text.prompt_embeds.shape[1]
        if self.guided and self.text.negative_prompt_embeds is None:
            yield check_prompts(self.negative_prompt or "", "negative_prompt"), length

    def check_noise(self, latents_shape: tuple[int, ...]) -> None:
        """Refuse a wrong number of generators, and latents of another shape."""
        check_generator(self.generator, self.batch_size)
        if self.latents is not None:
            check_tensor("latents", self.latents, latents_shape)


def check_integer(name: str, value: Any, low: int, high: float = 2**63 - 1) -> None:
    """Refuse anything but an integer from `low` to `high`, with `ValueError`."""
    integer = isinstance(value, Integral) and not isinstance(value, bool)  # NumPy's too
    if not integer or not low <= value <= high:
        expected = "a positive integer" if low == 1 else f"an integer of at least {low}"
        raise ValueError(f"{name} must be {expected}, got {reprlib.repr(value)}.")


def check_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> None:
    """Refuse anything but a finite number in [low, high], with `ValueError`."""
    if not is_finite_number(value) or not low <= value <= high:
        expected = "a finite number" if math.isinf(low) else f"a number from {low:g} to {high:g}"
        raise ValueError(f"{name} must be {expected}, got {reprlib.repr(value)}.")


def check_interval(name: str, value: Any) -> None:
    """Refuse anything but two numbers with 0 <= start <= stop <= 1, with `ValueError`."""
    pair = isinstance(value, tuple | list) and len(value) == 2
    if not (pair and all(map(is_finite_number, value)) and 0 <= value[0] <= value[1] <= 1):
        raise ValueError(
            f"{name} must be two fractions of the steps, (start, stop) with 0 <= start <= stop <= "
            f"1, got {reprlib.repr(value)}."
        )


def check_channels(part: str, made: str, channels: int, wanted: int) -> None:
    """Raise `ValueError` if what a part makes has other channels than the transformer takes."""
    if channels != wanted:
        raise ValueError(
            f"The {part} has {made} of {channels} channels, but the transformer takes {wanted}: "
            f"use the {part} that the transformer was trained with."
        )


def check_generator(generator: Any, batch_size: int) -> None:
    """Refuse anything but None, one `torch.Generator`, or a list with one per picture."""
    if generator is None:
        return
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(
            f"generator is a list of {len(generator)}, but {batch_size} pictures are generated: "
            "give one generator for all, or a list with one for each picture."
        )
    for one in generator if isinstance(generator, list) else [generator]:
        if not isinstance(one, torch.Generator):
            raise TypeError(
                f"generator must be a torch.Generator or a list of them, got {type(one).__name__}."
            )


def with_returned(tensors: dict[str, Any], returned: Any) -> dict[str, Any]:
    """Return tensors with those that a callback replaces, in their dtype and on their device.

    Refuse another shape, except the length of text. Without guidance, negative prompts may be None.
    Other names are left out, as in Diffusers.
    """
    if not isinstance(returned, dict):
        raise TypeError(
            "callback_on_step_end must return a dict of tensors or None, got "
            f"{type(returned).__name__}."
        )
    changed = dict(tensors)
    for name in tensors.keys() & returned.keys():
        new, like = returned[name], tensors[name.removeprefix("negative_")]
        if new is not None or not name.startswith("negative"):
            shape = like.shape if name == "latents" else (like.shape[0], None, *like.shape[2:])
            check = check_mask if name.endswith("mask") else check_shape
            check(f"The {name} that callback_on_step_end returns", new, shape)
            new = new.to(like)
        changed[name] = new
    return changed


def check_tensor(name: str, tensor: Any, shape: Sequence[int | None]) -> None:
    """Refuse anything but a tensor of finite values with this shape (None: any length)."""
    check_shape(name, tensor, shape)
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name} contains NaN or infinite values.")


def check_mask(name: str, mask: Any, shape: Sequence[int | None]) -> None:
    """Refuse anything but a tensor of 1 for tokens and 0 for padding with this shape."""
    check_shape(name, mask, shape)
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError(f"{name} must be 1 for tokens and 0 for padding; it has other values.")


def check_shape(name: str, tensor: Any, shape: Sequence[int | None]) -> None:
    """Refuse anything but a tensor with this shape (None: any length)."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}.")
    fits = len(shape) == tensor.ndim and all(
        want in (None, have) for want, have in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name} must have shape ({wanted}), got {tuple(tensor.shape)}.")


def check_one_of(name: str, values: Sequence[Any], available: Sequence[str]) -> None:
    """Refuse a list of values that are not `available`, with `ValueError`."""
    if not isinstance(values, list | tuple):
        raise TypeError(f"{name} must be a list or a tuple, got {reprlib.repr(values)}.")
    unknown = [value for value in values if value not in available]
    if unknown:
        raise ValueError(
            f"{name}: {', '.join(map(repr, unknown))} is not one of {', '.join(available)}."
        )


def check_one_each(what: str, count: int, prompts: int) -> None:
    """Refuse a number of images (or of `what`) other than one for all prompts or one per prompt."""
    if count not in (1, prompts):
        raise ValueError(
            f"There are {count} {what}s but {prompts} prompts: give one {what} for all, or one for "
            "each prompt."
        )


class DenoiserText:
    """The text for the denoiser: embeddings joined, and their common padding cut.

    The latest result is kept, and used again until one of the tensors changes. So is what the
    denoiser makes of it.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget the latest result and free its memory."""
        self._made_from: list[tuple[torch.Tensor, int]] = []
        self._made: Any = None

    def __call__(self, *pairs: tuple[torch.Tensor, torch.Tensor]) -> tuple[Any, Any]:
        """Join pairs of embeddings and mask, in order: `(sum of B, L, C)` and `(sum of B, L)`."""
        tensors = [tensor for pair in pairs for tensor in pair]
        if any(tensor.is_inference() for tensor in tensors):  # these have no version counter
            return self._join(pairs)
        same = len(tensors) == len(self._made_from) and all(
            tensor is known and tensor._version == version
            for tensor, (known, version) in zip(tensors, self._made_from, strict=True)
        )
        if not same:
            self._made_from = [(tensor, tensor._version) for tensor in tensors]
            self._made = self._join(pairs)
            reuse_projections(self._made[0])
        return self._made

    @staticmethod
    def _join(pairs: tuple[tuple[torch.Tensor, torch.Tensor], ...]) -> tuple[Any, Any]:
        embeds, masks = zip(*pairs, strict=True)
        if len(lengths := {tensor.shape[1] for tensor in (*embeds, *masks)}) > 1:
            raise ValueError(
                f"Embeddings and masks have {sorted(lengths)} tokens, but need the same number, "
                "also for negative prompts: have callback_on_step_end return all of them."
            )
        return cut_padding(torch.cat(embeds), torch.cat(masks))


@dataclass(eq=False)
class CallState:
    """The state of one call of a pipeline, which changes from step to step."""

    scheduler: Any = None  # None before and after the call
    device: torch.device | None = None  # that the pipeline computes on; None before and after
    guidance_scale: float = 1.0  # as in the request; callbacks may change it
    cross_attention_kwargs: dict[str, Any] | None = None  # as in the request
    within_interval: bool = True  # whether the present step lies within the guidance interval
    current_timestep: torch.Tensor | None = None
    num_timesteps: int = 0
    interrupt: bool = False  # whether to skip the remaining steps
    latest_context: str | None = None  # kind of the latest call of the denoiser, for step caches
    denoiser_text: DenoiserText = field(default_factory=DenoiserText)
    _watched: list[tuple[str, torch.Tensor, torch.dtype]] = field(default_factory=list)

    def watch(self, stage: str, *tensors: torch.Tensor | None) -> None:
        """Note whether what a stage gave is finite. This does not wait for a GPU."""
        self._watched += [
            (stage, tensor.isfinite().all(), tensor.dtype)
            for tensor in tensors
            if tensor is not None
        ]

    def check_finite(self) -> None:
        """Raise `ValueError` that names the first stage with a value that is not finite."""
        watched, self._watched = self._watched, []
        finite = torch.stack([flag for _, flag, _ in watched]).tolist() if watched else []
        for (stage, _, dtype), sound in zip(watched, finite, strict=True):
            if sound:
                continue
            if dtype == torch.float16:
                raise FieldValueError(
                    "{stage} gave NaN or infinite values, so there is no picture. float16 "
                    "overflows above 65504: {advice}, or bfloat16.",
                    stage=stage,
                    advice=Setting("torch_dtype", "float32", "load with torch_dtype=torch.float32"),
                )
            raise FieldValueError(
                "{stage} gave NaN or infinite values, so there is no picture. Its weights may be "
                "damaged: check that they are finite, or load them from another file.",
                stage=stage,
            )

    def end(self) -> None:
        """Forget what is of no use after the call, and free its memory."""
        self.scheduler = self.device = self.current_timestep = self.latest_context = None
        self.within_interval = True
        self.denoiser_text.clear()
        self._watched.clear()


class RunningCalls:
    """The calls of all pipelines that are running in this process, in any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: list[tuple[Any, int, CallState]] = []
        self._turns: WeakKeyDictionary[torch.nn.Module, Any] = WeakKeyDictionary()

    def begin(self, pipe: Any, scheduler: Any, state: CallState) -> None:
        """Register a call of this thread. It gets a copy of a scheduler that is in use already."""
        with self._lock:
            others = [(other.components.values(), thread) for other, thread, _ in self._running]
            for model in pipe.components.values() if others else ():
                threads = [thread for used, thread in others if any(m is model for m in used)]
                check_unused(model, threads)
            if any(running.scheduler is scheduler for *_, running in self._running):
                # The first copy is atomic: the scheduler may be at work in another thread.
                scheduler = copy.deepcopy(copy.copy(scheduler))
            state.scheduler = scheduler
            self._running.append((pipe, threading.get_ident(), state))

    def end(self, state: CallState) -> None:
        """Remove a call that has ended."""
        with self._lock:
            self._running = [call for call in self._running if call[2] is not state]

    def of(self, pipe: Any) -> list[CallState]:
        """Return a pipeline's innermost call in this thread; in other threads, all its calls."""
        calls = [call for call in self._running if call[0] is pipe]
        own = [state for _, thread, state in calls if thread == threading.get_ident()]
        return own[-1:] or [state for *_, state in calls]

    def turn(self, model: Any) -> AbstractContextManager[Any]:
        """Return the lock of a model, for work that changes it for a while: dtype, tiles, scale."""
        with self._lock:
            return self._turns.setdefault(model, threading.RLock())


def check_unused(model: Any, threads: list[int]) -> None:
    """Raise `RuntimeError` if a model that calls in `threads` use serves one call at a time."""
    if not threads or not isinstance(model, torch.nn.Module):
        return
    registries: list[Any] = [getattr(module, "_diffusers_hook", None) for module in model.modules()]
    hooks = [hook for registry in registries if registry for hook in registry.hooks.values()]
    if any(hook._is_stateful for hook in hooks):
        raise RuntimeError(
            "Another call is running, and the step cache holds the states of one call at a time: "
            "wait for the other call, or disable the cache."
        )
    offloaded = hooks or any(hasattr(module, "_hf_hook") for module in model.modules())
    if offloaded and any(thread != threading.get_ident() for thread in threads):
        raise RuntimeError(
            "Another thread is drawing with these models, which are offloaded and serve one thread "
            "at a time: wait for the other call, or switch offloading off."
        )
