"""What a run is made of before its first step: processes, data, models, state."""

from __future__ import annotations

import argparse
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from accelerate.utils import ProjectConfiguration

from localdit.config import PIXEL_MULTIPLE
from localdit.models.flops import forward_flops
from localdit.training import components, distributed, lora, sharding
from localdit.training.agreement import TrainingStopped
from localdit.training.data.batches import Draws, VisitDataset
from localdit.training.data.encoded import EncodedSet
from localdit.training.data.finding import Found, find_samples
from localdit.training.data.stage_data import StageData, prepare_data
from localdit.training.ema import ExponentialMovingAverage
from localdit.training.encode.fingerprints import encoder_fingerprints, weights_fingerprint
from localdit.training.encoding import vae_scale
from localdit.training.inputs import InputMaker, Inputs
from localdit.training.metrics import Metrics, peak_flops
from localdit.training.objective import Objective
from localdit.training.optimizer import make_optimizer
from localdit.training.pipeline_folder import PipelineFolder, ResultFolder
from localdit.training.sampling import PromptPictures
from localdit.training.stages import Stage
from localdit.training.state import Progress, TrainingState

if TYPE_CHECKING:
    from accelerate import Accelerator

    from localdit.models import LocalDiTTransformer2DModel


def start_processes(args: argparse.Namespace) -> Accelerator:
    """Start Accelerate, with the trackers that were asked for.

    Raises:
        TrainingStopped: if the processes can't work together as they were started.
    """
    trackers = [name for name in ("wandb", "tensorboard") if getattr(args, f"use_{name}")]
    try:
        return distributed.make_accelerator(
            args.stages[0].batch_size,
            args.gradient_clip,
            mixed_precision=args.mixed_precision,
            log_with=trackers or None,
            project_config=ProjectConfiguration(
                project_dir=str(args.output), logging_dir=str(args.output / "tensorboard")
            ),
        )
    except (RuntimeError, ValueError) as error:
        raise TrainingStopped(str(error)) from error


def find_data(args: argparse.Namespace) -> list[StageData]:
    """The data of every stage, so that nothing is missed on the way; each root is searched once.

    Raises:
        ValueError, OSError: if a stage has nothing to train on.
    """
    window_size = components.transformer_config(args).get("window_size", 4)
    found: dict[str, Found] = {}
    data = []
    for stage in args.stages:
        if stage.data_root not in found:
            found[stage.data_root] = find_samples(stage.data_root, args.data_format)
        prepared = prepare_data(
            found[stage.data_root],
            stage,
            window_size,
            PIXEL_MULTIPLE,
            args.crop,
            args.max_aspect_ratio,
            args.max_upscale,
            args.validation_samples,
        )
        prepared.order(stage, 1, args.seed)  # refuses a stage without samples
        data.append(prepared)
    return data


@dataclass
class Models:
    """The models of a run, and what is made with them.

    Attributes:
        transformer: in training, bare.
        objective: what it is trained for.
        make_inputs: encodes batches.
        latent_channels, vae_scale: of the VAE; the scale is pixels to a latent.
        result: writes what a run leaves: the folder of a pipeline, or of adapters.
        pictures: draws the validation prompts, if there are any.
    """

    transformer: LocalDiTTransformer2DModel
    objective: Objective
    make_inputs: InputMaker
    latent_channels: int
    vae_scale: int
    result: ResultFolder
    pictures: PromptPictures | None

    @property
    def frozen(self) -> bool:
        """Whether the transformer's own weights are left alone, and adapters are trained."""
        return isinstance(self.result, lora.AdapterFolder)

    def set_image_size(self, pixels: int) -> None:
        """Make the transformer one for pictures of another size, unless it is to stay as it is.

        Adapters will be used with the frozen one, which places pictures of any size as it does.
        """
        if not self.frozen:
            self.transformer.set_sample_size(pixels // self.vae_scale)

    def step_flops(self, inputs: Inputs) -> int:
        """Operations of the model for a batch, forward and backward.

        Frozen weights have no gradient, which spares a third; adapters hardly count.
        """
        rows, _, height, width = inputs.latents.shape
        passes = 2 if self.frozen else 3
        return passes * rows * _forward_flops(self.transformer, height, width, inputs.text.shape[1])

    def dataset(
        self, data: StageData, stage: Stage, args: argparse.Namespace, draws: Draws | None = None
    ) -> VisitDataset:
        """The samples of a stage, with the random choices of training unless others are given."""
        draws = draws or Draws(
            (args.seed, stage.index),
            args.token_dropout,
            args.horizontal_flip,
            args.timestep_sampling,
        )
        return VisitDataset(
            data.found.samples,
            data.sizes,
            draws,
            self.latent_channels,
            self.vae_scale,
            data.found.encoded,
        )


def load_models(
    args: argparse.Namespace, data: list[StageData], accelerator: Accelerator
) -> Models:
    """Load what the run needs; of encoded data that is neither VAE nor text encoder.

    Raises:
        ValueError, OSError: if models are missing or don't fit each other.
    """
    device = accelerator.device
    encoded = _encoded(args, data)
    pictures_wait = any(stage.found.encoded is None for stage in data)
    sources = components.encoder_sources(args)
    if encoded is not None and not args.pretrained:
        sources = encoded.manifest.sources
    encoders = None
    if pictures_wait or args.validation_prompts:
        text_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        encoders = components.load_encoders(sources, text_dtype)
        if encoded is not None:
            _require_same_encoders(encoded.manifest.fingerprints, encoder_fingerprints(encoders))
        encoders.to(device)
    if encoders is not None:
        text_width, channels = (
            encoders.text_encoder.config.d_model,
            encoders.vae.config.latent_channels,
        )
        scale = vae_scale(encoders.vae)
    else:
        assert encoded is not None
        text_width, channels = encoded.manifest.text_width, encoded.manifest.latent_channels
        scale = encoded.manifest.vae_scale

    transformer = components.load_transformer(args)
    components.check_fit(transformer, text_width, channels)
    objective = Objective(args.prediction_type, args.min_snr_gamma, args.flow_shift)
    result = _result_folder(args, transformer, objective, sources)
    transformer.to(device)
    if args.compile:
        transformer.compile_repeated_blocks()

    pictures = None
    if args.validation_prompts:
        assert encoders is not None
        pictures = PromptPictures(
            args.validation_prompts,
            encoders,
            args.max_caption_length,
            args.seed,
            args.validation_guidance_scale,
            rank=accelerator.process_index,
            num_processes=accelerator.num_processes,
        )
    models = Models(
        transformer,
        objective,
        InputMaker(
            device,
            encoders if pictures_wait else None,
            args.max_caption_length,
            transformer.use_additional_conditions,
            bf16=accelerator.mixed_precision == "bf16",
        ),
        channels,
        scale,
        result,
        pictures,
    )
    models.set_image_size(args.stages[0].image_size)
    return models


def _result_folder(
    args: argparse.Namespace,
    transformer: LocalDiTTransformer2DModel,
    objective: Objective,
    sources: dict[str, str],
) -> ResultFolder:
    """What the run leaves; where that is adapters, they are put into the transformer.

    Raises:
        ValueError, OSError: if encoders are missing, or the transformer can't have the adapters.
    """
    if args.lora_rank is None:
        return PipelineFolder(
            transformer,
            objective.sampling_scheduler(),
            components.encoder_folders(sources),
            components.tokenizer_class(sources),
        )
    fingerprint = weights_fingerprint(transformer, torch.float32)
    lora.add_adapters(transformer, args)
    return lora.AdapterFolder(transformer, args.transformer, fingerprint)


def _encoded(args: argparse.Namespace, data: list[StageData]) -> EncodedSet | None:
    """The encoded data of a run, if there is any; of several sets one, for they go together.

    Raises:
        ValueError: if they don't, or captions were cut at another length.
    """
    sets = [stage.found.encoded for stage in data if stage.found.encoded is not None]
    for encoded in sets:
        _require_same_encoders(sets[0].manifest.fingerprints, encoded.manifest.fingerprints)
        length = encoded.manifest.max_caption_length
        if length != args.max_caption_length:
            raise ValueError(
                f"{encoded.folder} was encoded with captions cut at {length} tokens, but "
                f"--max-caption-length is {args.max_caption_length}. Make the two agree."
            )
    return sets[0] if sets else None


def _require_same_encoders(expected: dict[str, str], given: dict[str, str]) -> None:
    different = [part for part, fingerprint in expected.items() if given[part] != fingerprint]
    if different:
        raise ValueError(
            f"Not all data was encoded with the same {' and '.join(different)}, or those that the "
            "options name are others. Encode it anew, or name the ones it was encoded with."
        )


@functools.lru_cache(maxsize=1024)
def _forward_flops(
    transformer: LocalDiTTransformer2DModel, height: int, width: int, text_tokens: int
) -> int:
    return forward_flops(transformer.config, height, width, text_tokens)


def make_state(
    args: argparse.Namespace, transformer: LocalDiTTransformer2DModel, accelerator: Accelerator
) -> TrainingState:
    """Prepare the transformer and its optimizer for the processes, and begin to average.

    Raises:
        ValueError: if the optimizer can't be split over processes that split the model, or
            adapters are to be trained by DeepSpeed.
    """
    if args.lora_rank is not None and accelerator.distributed_type == "DEEPSPEED":
        raise ValueError("--lora-rank has not been tried with DeepSpeed: use DDP or FSDP2.")
    if args.optimizer == "adamw8bit" and accelerator.distributed_type == "FSDP":
        raise ValueError("--optimizer adamw8bit can't be split over processes: use DDP, or adamw.")
    optimizer = make_optimizer(
        [parameter for _, parameter in sharding.trained_parameters(transformer)],
        args.optimizer,
        args.learning_rate,
        args.weight_decay,
        device=accelerator.device,
    )
    model, optimizer = distributed.prepare(accelerator, transformer, optimizer)
    ema = ExponentialMovingAverage(
        sharding.trained_parameters(model), args.ema_decay, "cpu" if args.ema_on_cpu else None
    )
    dtype = distributed.DTYPES.get(accelerator.mixed_precision)
    metrics = Metrics(
        accelerator.device,
        accelerator.num_processes,
        peak_flops(accelerator.device, dtype or torch.float32),
    )
    return TrainingState(model, optimizer, ema, accelerator.scaler, metrics, Progress())
