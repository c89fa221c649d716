"""What all LocalDiT pipelines share: the stages between a prompt and a picture.

Each pipeline's `__call__` reads as the algorithm: check, choose timesteps, encode the prompt,
prepare the latents, denoise, decode. The stages are here; the pipelines say only what differs.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from ..models.transformer import LocalDiTTransformer2DModel
from .autoencoding import AutoencodingMixin
from .guidance import DenoiserText, guided_steps
from .lora import LocalDiTLoraLoaderMixin
from .prediction import PredictionMixin
from .prompt_cache import PromptCache
from .prompts import PromptEncodingMixin
from .request import Request, TextEmbeddings
from .saving import SavingMixin
from .schedules import check_schedule
from .single_file import SingleFileMixin


class LocalDiTBasePipeline(
    SavingMixin,
    SingleFileMixin,
    LocalDiTLoraLoaderMixin,
    PromptEncodingMixin,
    PredictionMixin,
    AutoencodingMixin,
):
    """The components of a LocalDiT pipeline and the stages of sampling.

    Args:
        tokenizer: T5 tokenizer. May be None where embeddings are passed instead of prompts.
        text_encoder: T5 encoder; its last hidden state is the caption. May be None likewise.
        vae: autoencoder between pictures and latents.
        transformer: the denoiser.
        scheduler: any Diffusers scheduler; the released model samples with DPM-Solver++ 2M.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["tokenizer", "text_encoder"]
    _exclude_from_cpu_offload: list[str] = []
    _callback_tensor_inputs = ["latents", *TextEmbeddings._fields]

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: T5EncoderModel,
        vae: AutoencoderKL,
        transformer: LocalDiTTransformer2DModel,
        scheduler: KarrasDiffusionSchedulers,
    ) -> None:
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae,
            transformer=transformer,
            scheduler=scheduler,
        )
        depth = len(vae.config.block_out_channels) if vae is not None else 4
        self.vae_scale_factor = 2 ** (depth - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self.prompt_cache = PromptCache()
        self._denoiser_text = DenoiserText()
        self._num_timesteps = 0
        self._interrupt = False

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> "LocalDiTBasePipeline":
        """Make this pipeline from another one's components.

        Unlike in Diffusers, where the shared components become float32, they keep their dtypes
        unless a `dtype` or `torch_dtype` is given. Prompts that were encoded by a LocalDiT pipeline
        are known to both, and where its models are offloaded as a whole, they are from both.
        """
        if "dtype" in kwargs or "torch_dtype" in kwargs:
            return super().from_pipe(pipeline, **kwargs)
        made = cls(**{**pipeline.components, **kwargs})
        for name in ("prompt_cache", "_all_hooks", "_offload_device", "_offload_gpu_id"):
            if hasattr(pipeline, name):
                setattr(made, name, getattr(pipeline, name))
        return made

    @property
    def num_timesteps(self) -> int:
        """Number of denoising steps of the latest call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set `_interrupt` to True in a callback to skip the remaining steps."""
        return self._interrupt

    def check_inputs(self, request: Request) -> None:
        """Refuse what cannot work, before any work.

        Raises:
            ValueError: an argument cannot work; the message says what to do.
            TypeError: an argument is of a wrong type.
        """
        config = self.transformer.config
        request.check_values(
            self.vae_scale_factor * config.patch_size, self._callback_tensor_inputs
        )
        request.check_embeddings(config.caption_channels)
        request.check_prompts(self._can_encode)
        request.check_noise(self._latents_shape(request))

    def set_timesteps(self, request: Request) -> torch.Tensor:
        """Set the scheduler's timesteps, from the most noise to the least, and return them.

        Raises:
            ValueError: timesteps and sigmas were both given, or the scheduler takes no such thing,
                or its timesteps do not descend, or there are more of them than it can tell apart.
        """
        custom = {"timesteps": request.timesteps, "sigmas": request.sigmas}
        schedule: dict[str, Any] = {k: v for k, v in custom.items() if v is not None}
        if len(schedule) > 1:
            raise ValueError("Give either timesteps or sigmas, not both.")
        accepted = inspect.signature(self.scheduler.set_timesteps).parameters
        for name in schedule:
            if name not in accepted:
                raise ValueError(
                    f"{type(self.scheduler).__name__} takes no custom {name}: leave them out, or "
                    "use another scheduler."
                )
        schedule = schedule or {"num_inference_steps": request.num_inference_steps}
        self.scheduler.set_timesteps(device=self._execution_device, **schedule)
        check_schedule(self.scheduler)
        return self.scheduler.timesteps

    def encode_request(self, request: Request) -> TextEmbeddings:
        """Encode the request's prompts; see `encode_prompt`."""
        return TextEmbeddings(
            *self.encode_prompt(
                request.prompt,
                do_classifier_free_guidance=request.guided,
                negative_prompt=request.negative_prompt,
                num_images_per_prompt=request.num_images_per_prompt,
                max_sequence_length=request.max_sequence_length,
                **request.text._asdict(),
            )
        )

    def prepare_noise(self, request: Request) -> torch.Tensor:
        """Return standard normal noise `(B, C, height / 8, width / 8)`: drawn, or as given.

        It is float32 in every case, so that a seed means the same picture in any dtype.
        """
        noise = request.latents
        if noise is None:
            noise = randn_tensor(
                self._latents_shape(request), request.generator, self._execution_device
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
            latents: `(B, C, H, W)`, noisy as at the first timestep.
            timesteps: the timesteps to take, a tail of the scheduler's.
            text: B rows each; the negative ones may be None without guidance.
            request: for guidance, eta, generators and callback.
            after_step: given the latents that a step made and its index, returns those to go on
                with; the callback comes after it.

        Returns:
            The denoised latents, `(B, C, H, W)`.
        """
        callback = request.callback_on_step_end
        callback_inputs = request.callback_on_step_end_tensor_inputs
        if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
            callback_inputs = callback.tensor_inputs
        tensors = {"latents": latents.to(self.transformer.dtype), **text._asdict()}
        accepted = inspect.signature(self.scheduler.step).parameters
        options = {"eta": request.eta, "generator": request.generator}
        step_options = {name: value for name, value in options.items() if name in accepted}

        guided = guided_steps(request.guidance_interval, len(timesteps))
        self._guidance_scale = request.guidance_scale
        self._cross_attention_kwargs = request.cross_attention_kwargs
        self._num_timesteps = len(timesteps)
        self._interrupt = False
        with self.denoising(), self.progress_bar(total=len(timesteps)) as progress_bar:
            for index, timestep in enumerate(timesteps):
                if self.interrupt:
                    break
                self._within_interval = index in guided
                self._current_timestep = timestep
                prediction = self.predict(timestep, **tensors)
                tensors["latents"] = self.scheduler.step(
                    prediction, timestep, tensors["latents"], **step_options, return_dict=False
                )[0]
                if after_step is not None:
                    tensors["latents"] = after_step(tensors["latents"], index)
                if callback is not None:
                    shown = {name: tensors[name] for name in callback_inputs}
                    tensors |= callback(self, index, timestep, shown) or {}
                progress_bar.update()
        return tensors["latents"]
