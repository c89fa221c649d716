"""The stages between a prompt and a picture that all LocalDiT pipelines share.

Each pipeline's `__call__` reads as the algorithm: check, choose timesteps, encode the prompt,
prepare the latents, denoise, decode. The stages are here, on top of the diffusion core
(`localdit.core`); the pipelines add only what differs.
"""

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.conditions import size_conditions
from ..core.latents import LatentSpace
from ..core.samplers import SamplingSettings
from ..core.schedulers import (
    check_prediction,
    check_schedule,
    check_step,
    default_settings,
    scale_input,
    set_timesteps,
    warn_of_other_prediction,
)
from ..core.text import TextCache, TextSpace, check_prompts, unused_negative_prompt
from ..machine import give_memory_back
from ..models.transformer import LocalDiTTransformer2DModel
from ..sizes import PIXELS_PER_LATENT
from . import lora
from .request import (
    CallState,
    Request,
    RunningCalls,
    TextEmbeddings,
    check_channels,
    with_returned,
)
from .saving import SavedPipeline

logger = logging.getLogger(__name__)

CALLS = RunningCalls()


def _of_call(name: str) -> Any:
    """Return a property of a pipeline that reads and writes an attribute of its running call.

    In a thread that runs none of its calls, it writes that of all of them.
    """

    def write(pipe: Any, value: Any) -> None:
        for state in CALLS.of(pipe) or [pipe._latest_call]:
            setattr(state, name, value)

    return property(lambda pipe: getattr(pipe._call, name), write)


class LocalDiTBasePipeline(SavedPipeline):
    """The components of a LocalDiT pipeline and the stages of sampling.

    Args:
        tokenizer: tokenizer of the text encoder. May be None if embeddings are passed instead of
            prompts.
        text_encoder: a T5-type encoder, a CLIP text model, or a decoder such as Gemma; its last
            hidden states are the caption. May be None if embeddings are passed.
        vae: autoencoder between pictures and latents.
        transformer: the denoiser.
        scheduler: a Diffusers scheduler whose step takes a prediction, a timestep and latents; the
            released model samples with DPM-Solver++ 2M.
        num_inference_steps, guidance_scale: the settings that suit the model, for calls that give
            none. They are saved with the pipeline; `pipe.register_to_config(guidance_scale=2.0)`
            changes one.
        whole_words: whether the text encoder understands only whole words, each of which is one
            token. Calls then log a warning that names all other words. It is saved with the
            pipeline.

    Raises:
        TypeError, ValueError: a setting of the wrong type or out of range.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["tokenizer", "text_encoder", "vae"]
    _exclude_from_cpu_offload: list[str] = []
    _callback_tensor_inputs = ["latents", *TextEmbeddings._fields]

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: PreTrainedModel,
        vae: AutoencoderKL | AutoencoderDC | AutoencoderTiny,
        transformer: LocalDiTTransformer2DModel,
        scheduler: KarrasDiffusionSchedulers,
        num_inference_steps: int = SamplingSettings.num_inference_steps,
        guidance_scale: float = SamplingSettings.guidance_scale,
        whole_words: bool = False,
    ) -> None:
        super().__init__()
        self.prompt_cache = TextCache()
        self.register_to_config(
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            whole_words=whole_words,
        )
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae,
            transformer=transformer,
            scheduler=scheduler,
        )
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self._latest_call = CallState()

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute. Another text encoder gets another cache, as pipelines may share one."""
        if name == "text_encoder" and value not in (None, vars(self).get(name)):
            self.prompt_cache = TextCache(self.prompt_cache.max_bytes)
        super().__setattr__(name, value)

    def register_to_config(self, **values: Any) -> None:
        """Set values of `config`, which are saved with the pipeline.

        Raises:
            TypeError, ValueError: a setting of the wrong type or out of range, which could not be
                loaded again.
        """
        SamplingSettings.of(values)
        if not isinstance(whole_words := values.get("whole_words", False), bool):
            raise TypeError(f"whole_words is {whole_words!r}; expected True or False.")
        super().register_to_config(**values)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> "LocalDiTBasePipeline":
        """Make this pipeline from the components of another one.

        Unlike in Diffusers, where the shared components become float32, they keep their dtypes
        unless a `dtype` or `torch_dtype` is given. Both pipelines share the cache of encoded
        prompts, as long as they have the same text encoder, and, if whole models are offloaded, the
        offloading. The number of steps and the guidance scale that suit the model, and
        `whole_words`, are kept too. `pipe.components` has none of these, so a pipeline of
        `**pipe.components` has the defaults.
        """
        if "dtype" in kwargs or "torch_dtype" in kwargs:
            return super().from_pipe(pipeline, **kwargs)
        own: dict[str, Any] = asdict(SamplingSettings.of(pipeline.config))
        own["whole_words"] = pipeline.config.get("whole_words", False)
        made = cls(**{**own, **pipeline.components, **kwargs})
        shared = ["_all_hooks", "_offload_device", "_offload_gpu_id"]
        if made.text_encoder in (None, pipeline.components.get("text_encoder")):
            shared.append("prompt_cache")
        for name in shared:
            if hasattr(pipeline, name):
                setattr(made, name, getattr(pipeline, name))
        return made

    # Components

    @property
    def latent_space(self) -> LatentSpace:
        """The latent space of the present autoencoder."""
        return LatentSpace(self.vae)

    @property
    def text_space(self) -> TextSpace:
        """The text space of the present tokenizer and text encoder."""
        return TextSpace(
            self.tokenizer, self.text_encoder, self.prompt_cache, self.config.whole_words
        )

    @property
    def vae_scale_factor(self) -> int:
        """Pixels along the side of one latent."""
        if self.vae is None:
            return PIXELS_PER_LATENT
        return self.latent_space.format.pixels_per_latent

    @property
    def pixels_per_token(self) -> int:
        """Pixels along the side of one token; heights and widths are multiples of it."""
        return self.vae_scale_factor * self.transformer.config.patch_size

    @property
    def scheduler(self) -> Any:
        """The scheduler; within a call, the one that this call works on."""
        state = self._call
        return self.__dict__["scheduler"] if state.scheduler is None else state.scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        warn_of_other_prediction(self.__dict__.get("scheduler"), scheduler)
        self.__dict__["scheduler"] = scheduler
        if self._call.scheduler is not None:
            self._call.scheduler = scheduler

    # State of a call

    @contextmanager
    def running(self, request: Request) -> Iterator[None]:
        """Give a call its own state, and clear the state that it shares with other calls.

        PyTorch's default dtype and device do not matter within it.
        """
        state = CallState(
            device=super()._execution_device,
            guidance_scale=float(request.guidance_scale),
            cross_attention_kwargs=request.cross_attention_kwargs,
        )
        CALLS.begin(self, self.__dict__["scheduler"], state)
        self._latest_call = state
        try:
            self.transformer._reset_stateful_cache()
            with default_settings():
                yield
        finally:
            self.transformer._reset_stateful_cache()
            CALLS.end(state)
            state.end()

    @property
    def _call(self) -> CallState:
        """The state of this thread's call, or else of the latest one."""
        if "_latest_call" not in self.__dict__:  # while the pipeline is made
            return CallState()
        running = CALLS.of(self)
        return running[-1] if running else self._latest_call

    @property
    def _execution_device(self) -> torch.device:
        # Diffusers looks at every module; with a small model, that is a tenth of a call.
        return self._call.device or super()._execution_device

    _guidance_scale = _of_call("guidance_scale")
    _interrupt = _of_call("interrupt")
    _within_interval = _of_call("within_interval")
    _denoiser_text = _of_call("denoiser_text")

    @property
    def guidance_scale(self) -> float:
        """Weight g of `uncond + g * (text - uncond)`; a callback may set `_guidance_scale`."""
        return self._call.guidance_scale

    @property
    def cross_attention_kwargs(self) -> dict[str, Any] | None:
        """Further arguments of the transformer: the scale of LoRA adapters."""
        return self._call.cross_attention_kwargs

    @property
    def do_classifier_free_guidance(self) -> bool:
        """True if the negative prompt takes part in the present step.

        It does if the guidance scale exceeds 1, within the guidance interval.
        """
        return self._call.guidance_scale > 1 and self._call.within_interval

    @property
    def current_timestep(self) -> torch.Tensor | None:
        """The timestep of the step that is being computed; None outside of a call."""
        return self._call.current_timestep

    @property
    def num_timesteps(self) -> int:
        """Number of denoising steps of the latest call."""
        return self._call.num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set `_interrupt` to True in a callback to skip the remaining steps.

        In another thread, this ends all calls of the pipeline that are running.
        """
        return self._call.interrupt

    # Stages

    def check_inputs(self, request: Request) -> None:
        """Check all arguments of a call before any work."""
        if self.vae is not None:
            channels = self.latent_space.format.channels
            wanted = self.transformer.config.in_channels
            check_channels("autoencoder", "latents", channels, wanted)
        caption_channels = self.transformer.config.caption_channels
        if self.text_encoder is not None and caption_channels is not None:
            check_channels("text encoder", "states", self.text_space.width, caption_channels)
        check_step(self.scheduler)
        check_prediction(self.scheduler)
        request.check_values(self.pixels_per_token, self._callback_tensor_inputs)
        if request.output_type != "latent":
            self.require_parts(f"output_type={request.output_type!r}", "vae")
        request.text.check(
            request.prompt, request.negative_prompt, caption_channels, request.max_sequence_length
        )
        request.check_prompts(self.text_space.can_encode)
        request.check_noise(self._latents_shape(request))
        scale = (request.cross_attention_kwargs or {}).get("scale", 1)
        if scale != 1 and not lora.has_active(self.transformer):
            logger.warning(
                "The scale in cross_attention_kwargs has no effect: the transformer has no LoRA "
                "that is active. One that is fused is part of the weights."
            )

    def settings_of_call(
        self,
        num_inference_steps: int | None,
        guidance_scale: float | None,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
    ) -> dict[str, Any]:
        """Return steps and guidance scale by name; the pipeline's own where a call gives None."""
        if num_inference_steps is not None and not (timesteps is None and sigmas is None):
            logger.warning("num_inference_steps has no effect beside custom timesteps or sigmas.")
        given = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        return {
            name: self.config[name] if value is None else value for name, value in given.items()
        }

    def set_timesteps(self, request: Request) -> torch.Tensor:
        """Set the scheduler's timesteps, and return those to take, the most noise first."""
        custom = request.custom_schedule
        if len(custom) > 1:
            raise ValueError("Give either timesteps or sigmas, not both.")
        accepted = inspect.signature(self.scheduler.set_timesteps).parameters
        for name in custom:
            if name not in accepted:
                raise ValueError(
                    f"{type(self.scheduler).__name__} takes no custom {name}: leave them out, or "
                    "use another scheduler."
                )
        try:
            first = set_timesteps(
                self.scheduler,
                self._execution_device,
                request.num_inference_steps,
                request.strength,
                custom,
            )
        except OverflowError as error:
            raise ValueError(f"The schedule has a number that is too large ({error}).") from error
        check_schedule(self.scheduler)
        return self.scheduler.timesteps[first:]

    def encode_request(self, request: Request) -> TextEmbeddings:
        """Encode the prompts of a request: see `encode_prompt`."""
        if unused := unused_negative_prompt(request.negative_prompt, request.guided):
            logger.warning("%s", unused)
        text = TextEmbeddings(
            *self.encode_prompt(
                request.prompt,
                do_classifier_free_guidance=request.guided,
                negative_prompt=request.negative_prompt,
                num_images_per_prompt=request.num_images_per_prompt,
                max_sequence_length=request.max_sequence_length,
                **request.text._asdict(),
            )
        )
        self._call.watch("The text encoder", text.prompt_embeds, text.negative_prompt_embeds)
        return text

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = "",
        num_images_per_prompt: int = 1,
        device: str | torch.device | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        max_sequence_length: int = 120,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Encode prompts, or prepare given embeddings, one row per picture.

        `prompt_cache` keeps the states of encoded prompts for later calls. A pipeline with
        `whole_words` logs one warning that names the words it does not know.

        Args:
            prompt: B prompts; None with `prompt_embeds`.
            do_classifier_free_guidance: return negative embeddings as well.
            negative_prompt: one for all prompts or one per prompt; None is the empty prompt.
            num_images_per_prompt: rows per prompt, n.
            device: device of the results; by default the one that the pipeline computes on.
            prompt_embeds, negative_prompt_embeds: embeddings to use instead, `(B, L, C)`.
            prompt_attention_mask, negative_prompt_attention_mask: their masks, `(B, L)`.
            max_sequence_length: tokens L that a prompt is padded or cut to.

        Returns:
            Embeddings `(B * n, L, C)` in the transformer's dtype and masks `(B * n, L)` of the
            prompts, then of the negative prompts (None and None without guidance).

        Raises:
            TypeError, ValueError: as a call does.
        """
        TextEmbeddings(
            prompt_embeds,
            prompt_attention_mask,
            negative_prompt_embeds,
            negative_prompt_attention_mask,
        ).check(
            prompt,
            negative_prompt,
            None if self.transformer is None else self.transformer.config.caption_channels,
            max_sequence_length,
        )
        device = self._execution_device if device is None else torch.device(device)
        model = self.transformer if self.transformer is not None else self.text_encoder
        encoded: list[str] = []
        if prompt_embeds is None or prompt_attention_mask is None:
            encoded = check_prompts(prompt)
            prompt_embeds, prompt_attention_mask = self.text_space.encode(
                encoded, max_sequence_length, device
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
                encoded = [*encoded, *prompts]
                negative_prompt_embeds, negative_prompt_attention_mask = self.text_space.encode(
                    prompts, length, device
                )
                if len(prompts) not in (1, rows):
                    raise ValueError(f"{rows} prompts but {len(prompts)} negative prompts.")
                repeats *= rows // len(prompts)
            negative_prompt_embeds, negative_prompt_attention_mask = (
                negative_prompt_embeds.to(device, dtype).repeat_interleave(repeats, dim=0),
                negative_prompt_attention_mask.to(device).repeat_interleave(repeats, dim=0),
            )
        if self.config.whole_words and (unknown := self.text_space.unknown(encoded)):
            logger.warning("%s", unknown)
        # Diffusers' tests read the names in the return statement: those of `__call__`.
        return (
            prompt_embeds,
            prompt_attention_mask,
            negative_prompt_embeds,
            negative_prompt_attention_mask,
        )

    def release_text_encoder(self) -> None:
        """Drop the text encoder and free its memory; prompts encoded before still work.

        Their states are in `prompt_cache`, for the life of the process. Any other prompt raises
        `ValueError` until `text_encoder` is set again. Memory is freed only if nothing else refers
        to the encoder, such as another pipeline of the same components, or a variable.
        """
        self.text_encoder = None
        # Offloading holds each model in the hook of the next one; this sets the hooks up again.
        self.maybe_free_model_hooks()
        give_memory_back()

    def prepare_noise(self, request: Request) -> torch.Tensor:
        """Return standard normal noise `(B, C, h, w)`: the request's latents, or drawn.

        It is float32 in every case, so that a seed gives the same picture in any dtype.
        """
        noise = request.latents
        if noise is None:
            noise = randn_tensor(
                self._latents_shape(request),
                request.generator,
                self._execution_device,
                torch.float32,
            )
        return noise.to(self._execution_device, torch.float32)

    def _latents_shape(self, request: Request) -> tuple[int, ...]:
        return (
            request.batch_size,
            self.transformer.config.in_channels,
            request.height // self.vae_scale_factor,
            request.width // self.vae_scale_factor,
        )

    def denoise(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        text: TextEmbeddings,
        request: Request,
        after_step: Callable[[torch.Tensor, int], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Step the latents through the timesteps.

        Args:
            latents: `(B, C, H, W)`, with the noise of the first timestep.
            timesteps: the timesteps to take: the scheduler's, or the last of them.
            text: B rows each; the negative ones may be None without guidance.
            request: gives guidance, eta, generators and callback.
            after_step: called with the latents after a step and the step's index, before the
                callback; returns the latents to continue with.

        Returns:
            The denoised latents, `(B, C, H, W)`.
        """
        callback = request.callback_on_step_end
        tensors = {"latents": latents.to(self.transformer.dtype), **text._asdict()}
        accepted = inspect.signature(self.scheduler.step).parameters
        options = {"eta": request.eta, "generator": request.generator}
        step_options = {name: value for name, value in options.items() if name in accepted}
        steps, state = len(timesteps), self._call
        guided = request.guided_steps(steps)
        if request.guided and steps > 0 and not guided:
            logger.warning(
                "No step is guided: guidance_interval %s covers none of %d steps.",
                request.guidance_interval,
                steps,
            )
        state.num_timesteps = steps
        with self.progress_bar(total=steps) as progress_bar:
            for index, timestep in enumerate(timesteps):
                if state.interrupt:
                    break
                state.within_interval = index in guided
                state.current_timestep = timestep
                prediction = self.predict(timestep, **tensors)
                state.watch(f"The denoiser at step {index + 1} of {steps}", prediction)
                tensors["latents"] = self.scheduler.step(
                    prediction, timestep, tensors["latents"], **step_options, return_dict=False
                )[0]
                if after_step is not None:
                    tensors["latents"] = after_step(tensors["latents"], index)
                if callback is not None:
                    shown = {name: tensors[name] for name in request.callback_inputs}
                    tensors = with_returned(tensors, callback(self, index, timestep, shown) or {})
                state.watch(
                    f"The scheduler, or a callback, at step {index + 1} of {steps}",
                    tensors["latents"],
                )
                progress_bar.update()
        return tensors["latents"]

    def predict(
        self,
        timestep: torch.Tensor,
        latents: torch.Tensor,
        prompt_embeds: torch.Tensor,
        prompt_attention_mask: torch.Tensor,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the transformer's prediction, with classifier-free guidance if it is on.

        Guidance (Ho and Salimans, 2022) is `uncond + g * (text - uncond)`, with both halves in one
        batch, the negative prompts first.
        """
        guided = self.do_classifier_free_guidance
        pairs = [(prompt_embeds, prompt_attention_mask)]
        if guided:
            if negative_prompt_embeds is None or negative_prompt_attention_mask is None:
                raise ValueError(
                    "The guidance scale is above 1 during sampling, but the negative prompt was "
                    "not encoded, or callback_on_step_end returned None for it: start with a "
                    "guidance_scale above 1, and do not drop the negative prompt."
                )
            latents = torch.cat([latents, latents])
            pairs.insert(0, (negative_prompt_embeds, negative_prompt_attention_mask))
        embeds, mask = self._call.denoiser_text(*pairs)
        height, width = (self.vae_scale_factor * length for length in latents.shape[2:])
        kind = "cond_uncond" if guided else "cond"
        with CALLS.turn(self.transformer), self._cache_context(kind):
            prediction = self.transformer(
                scale_input(self.scheduler, latents, timestep),
                encoder_hidden_states=embeds,
                encoder_attention_mask=mask,
                timestep=timestep.to(latents.device).expand(len(latents)),
                added_cond_kwargs=size_conditions(
                    self.transformer.use_additional_conditions, height, width, latents.device
                ),
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
        """Name the kind of call for a step cache, and drop its states of another kind.

        Those have another batch size and are several steps old.
        """
        if name != self._call.latest_context:
            self.transformer._reset_stateful_cache()
            self._call.latest_context = name
        return self.transformer.cache_context(name)

    def decode(self, latents: torch.Tensor, request: Request) -> torch.Tensor:
        """Decode latents `(B, C, h, w)` into pictures `(B, 3, H, W)` in [0, 1].

        If the output type is "latent", the latents are returned as they are.
        """
        if request.output_type == "latent":
            self._call.check_finite()
            return latents
        with CALLS.turn(self.vae):
            pictures = self.latent_space.decode(latents)
        self._call.watch("The autoencoder (VAE), decoding,", pictures)
        self._call.check_finite()
        return self.image_processor.postprocess(pictures, output_type="pt")

    def output(self, pictures: torch.Tensor, request: Request) -> ImagePipelineOutput | tuple[Any]:
        """Return decoded pictures in the requested output type; free offloaded models."""
        images: Any = pictures
        if request.output_type in ("np", "pil"):
            images = self.image_processor.pt_to_numpy(pictures)
        if request.output_type == "pil":
            images = self.image_processor.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if request.return_dict else (images,)
