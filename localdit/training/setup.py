"""Setting up the parts of a run: processes, data, models, training method and state."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import ProjectConfiguration

from localdit.config import Config
from localdit.core.diffusion import Objective
from localdit.core.encoders import (
    encoder_classes,
    encoder_folders,
    load_encoders,
    locate_encoder,
    text_encoder_whole_words,
    text_encoder_width,
    tokenizer_fingerprint,
    weights_fingerprint,
)
from localdit.core.latents import LatentFormat
from localdit.core.parts import PARTS, load_tokenizer, load_vae, locate
from localdit.sizes import PIXELS_PER_LATENT
from localdit.training import initialization, processes
from localdit.training.data.batches import Draws, VisitDataset
from localdit.training.data.encoded import EncodedSet, require_latent_format
from localdit.training.data.finding import Found, find_samples
from localdit.training.data.stage_data import StageData, prepare_data, withhold
from localdit.training.methods import InputMaker, Method, Sampling, method_class
from localdit.training.methods.repa import FEATURES, image_encoder_config, load_latent_features
from localdit.training.metrics import Metrics, peak_flops
from localdit.training.optimizer import make_optimizer
from localdit.training.options import check_image_size, given
from localdit.training.parser import PICTURE_OPTIONS
from localdit.training.post_hoc_ema import SIGMA_RELS
from localdit.training.results import (
    AdapterFolder,
    PipelineFolder,
    ResultFolder,
    add_adapters,
    shape_of,
)
from localdit.training.sharding import trained_parameters
from localdit.training.shutdown import TrainingStopped
from localdit.training.stages import Stage
from localdit.training.state import (
    TRANSFORMER,
    ExponentialMovingAverage,
    PowerFunctionAverage,
    Progress,
    TrainedModel,
    TrainingState,
)
from localdit.training.validation import PromptPictures

if TYPE_CHECKING:
    from accelerate import Accelerator

    from localdit.models import LocalDiTTransformer2DModel


def start_processes(args: argparse.Namespace) -> Accelerator:
    """Start Accelerate with the trackers of the options.

    Raises:
        TrainingStopped: if the processes can't work together, or not in this precision.
    """
    trackers = [name for name in ("wandb", "tensorboard") if getattr(args, f"use_{name}")]
    try:
        accelerator = processes.make_accelerator(
            args.stages[0].batch_size,
            args.gradient_clip,
            mixed_precision=args.mixed_precision,
            log_with=trackers or None,
            project_config=ProjectConfiguration(
                project_dir=str(args.output), logging_dir=str(args.output / "tensorboard")
            ),
        )
        if not args.dry_run:  # it may plan a run on another machine
            processes.require_precision(accelerator)
        return accelerator
    except (RuntimeError, ValueError) as error:
        raise TrainingStopped(str(error)) from error


def find_data(args: argparse.Namespace) -> list[StageData]:
    """Find the data of all stages before training begins. Each root is searched once."""
    initialization.require_shape_used(args)
    shape = initialization.transformer_config(args)
    num_layers, window_size = shape.get("num_layers", 18), shape.get("window_size", 4)
    settings = method_class(args).settings(args, num_layers)  # refuses blocks that it lacks
    if args.repa_weight:
        image_encoder_config(args.repa_encoder)  # refuses folders without an image encoder
    found: dict[str, Found] = {}
    data = []
    for stage in args.stages:
        if stage.data_root not in found:
            found[stage.data_root] = find_samples(
                stage.data_root, args.data_format, output=args.output
            )
        latents = latents_of(args, found[stage.data_root])
        pixels_per_token = latents.pixels_per_latent * shape.get("patch_size", 2)
        check_image_size(stage.image_size, pixels_per_token)
        prepared = prepare_data(
            found[stage.data_root],
            stage,
            window_size,
            pixels_per_token,
            given(args, PICTURE_OPTIONS),
            args.validation_samples,
        )
        if routing := settings.get("routing"):  # refuses maps that are too small
            for bucket in set(prepared.buckets[prepared.buckets >= 0].tolist()):
                height, width = (side // pixels_per_token for side in prepared.sizes[bucket])
                routing.rectangle(height, width, window_size)
        data.append(prepared)
    withhold(data)
    for stage, prepared in zip(args.stages, data, strict=True):
        prepared.order(stage, 1, args.seed)  # refuses a stage without samples
    return data


def local_tokenizer(args: argparse.Namespace) -> Any:
    """Return the tokenizer of the options; None if it is not on this machine: none is fetched."""
    source = initialization.encoder_sources(args)["tokenizer"]
    try:
        return load_tokenizer(locate(PARTS["tokenizer"], source, local_files_only=True))
    except (OSError, ValueError):
        return None


def latents_of(args: argparse.Namespace, found: Found) -> LatentFormat:
    """Return the format of the data's latents; of the autoencoder, only its configuration is read.

    Channels and pixels of the released one are known, so a dry run fetches nothing.
    """
    if found.encoded is not None:
        return found.encoded.manifest.latent_format
    source = initialization.encoder_sources(args)["vae"]
    if source == str(Config.vae):
        return LatentFormat(4, PIXELS_PER_LATENT)
    return initialization.latent_format(source)


def text_width_of(args: argparse.Namespace, found: Found) -> int:
    """Return the channels of the data's text, as `latents_of` returns the format of its latents."""
    if found.encoded is not None:
        return found.encoded.manifest.text_width
    source = initialization.encoder_sources(args)["text_encoder"]
    if source == str(Config.text_encoder):
        return 4096
    return text_encoder_width(locate_encoder("text_encoder", source))


@dataclass
class Models:
    """The models of a run, and the objects that use them."""

    method: Method
    make_inputs: InputMaker
    latents: LatentFormat
    result: ResultFolder
    fingerprints: dict[str, str]  # SHA-256 of each frozen model in use, by its name
    settings: dict[str, dict[str, Any]]  # that tell what the weights of frozen models compute
    pictures: PromptPictures | None  # of the validation prompts, if there are any

    def dataset(
        self, data: StageData, stage: Stage, args: argparse.Namespace, draws: Draws | None = None
    ) -> VisitDataset:
        """Return the samples of a stage, by default with the random choices of training."""
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
            self.latents.channels,
            self.latents.pixels_per_latent,
            data.found.encoded,
        )


def load_models(
    args: argparse.Namespace,
    data: list[StageData],
    accelerator: Accelerator,
    checkpoint: Path | None = None,
) -> Models:
    """Load the models. Encoded data needs neither VAE nor text encoder.

    Args:
        checkpoint: the checkpoint to resume from, if any. Unless the run trains adapters, the
            result has its weights instead of those of `--transformer`, and so its settings.
    """
    device, bf16 = accelerator.device, accelerator.mixed_precision == "bf16"
    encoded = _encoded(args, data)
    pictures_wait = any(stage.found.encoded is None for stage in data)
    otherwise = initialization.RELEASED if encoded is None else encoded.manifest.sources
    sources = initialization.encoder_sources(args, otherwise)
    if encoded is not None:
        expected = initialization.latent_format(sources["vae"])
        for each in (stage.found.encoded for stage in data):
            if each is not None:
                require_latent_format(each.folder, each.manifest, expected)
    encoders = None
    if pictures_wait or args.validation_prompts:
        text_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        encoders = load_encoders(sources, text_dtype)
        fingerprints = encoders.fingerprints()
        if encoded is not None:
            _require_same_encoders(encoded.manifest.fingerprints, fingerprints)
        encoders.to(device)
        vae, text_width, latents = encoders.vae, encoders.text.width, encoders.latents.format
    else:
        assert encoded is not None
        vae = _vae_that_encoded(encoded, sources)
        fingerprints = encoded.manifest.fingerprints
        text_width = encoded.manifest.text_width
        latents = encoded.manifest.latent_format
    transformer = initialization.load_transformer(args, text_width, latents, checkpoint)
    objective = Objective(args.prediction_type, args.min_snr_gamma, args.flow_shift)
    kind = method_class(args)
    start = args.transformer
    if checkpoint is not None and args.lora_rank is None:
        start = checkpoint / TRANSFORMER
    sampling = kind.sampling(args, objective, start)
    result = _result_folder(args, transformer, sampling, sources, start)
    transformer.to(device)
    frozen = kind.frozen_models(args, transformer)
    if args.repa_weight:
        frozen[FEATURES] = load_latent_features(args.repa_encoder, vae, bf16)
    method = kind(
        transformer,
        objective,
        args.lora_rank is not None,
        {name: model.to(device) for name, model in frozen.items()},
        **kind.settings(args, transformer.config.num_layers),
    )
    fingerprints = fingerprints | {
        name: weights_fingerprint(model, torch.float32) for name, model in method.frozen.items()
    }
    frozen_transformers: dict[str, Any] = {
        name: model for name, model in method.frozen.items() if name != FEATURES
    }
    if args.lora_rank is not None:
        frozen_transformers[TRANSFORMER] = transformer
    frozen_settings = {"vae": asdict(latents)} | {
        name: shape_of(model) | {"sample_size": model.config.sample_size}
        for name, model in frozen_transformers.items()
    }
    if args.compile:
        transformer.compile_repeated_blocks()

    pictures = None
    if args.validation_prompts:
        assert encoders is not None
        if args.validation_guidance_scale is not None:
            settings = replace(sampling.settings, guidance_scale=args.validation_guidance_scale)
            sampling = replace(sampling, settings=settings)
        pictures = PromptPictures(
            args.validation_prompts,
            encoders,
            args.max_caption_length,
            args.seed,
            sampling,
            text_encoder_whole_words(sources),
            rank=accelerator.process_index,
            num_processes=accelerator.num_processes,
        )
    return Models(
        method,
        InputMaker(
            device,
            encoders if pictures_wait else None,
            args.max_caption_length,
            (transformer, *method.frozen.values()),
            bf16=bf16,
            guided=method.guided,
            empty_text=encoded.empty_text if encoded is not None else None,
        ),
        latents,
        result,
        fingerprints,
        frozen_settings,
        pictures,
    )


def _result_folder(
    args: argparse.Namespace,
    transformer: LocalDiTTransformer2DModel,
    sampling: Sampling,
    sources: dict[str, str],
    start: Path | None,
) -> ResultFolder:
    """Return the writer of the result. If that is adapters, add them to the transformer."""
    if args.lora_rank is None:
        return PipelineFolder(
            transformer,
            sampling,
            encoder_folders(sources),
            encoder_classes(sources),
            start,
            text_encoder_whole_words(sources),
        )
    fingerprint = weights_fingerprint(transformer, torch.float32)
    add_adapters(transformer, args)
    return AdapterFolder(transformer, args.transformer, fingerprint, sampling)


def _encoded(args: argparse.Namespace, data: list[StageData]) -> EncodedSet | None:
    """Return the first encoded set of a run, if any; refuse sets of different encoders."""
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


def _vae_that_encoded(encoded: EncodedSet, sources: dict[str, str]) -> Any:
    """Load the autoencoder of encoded data, which the result of the run will have.

    The result will have the tokenizer and the text encoder of `sources`, too. The text encoder is
    large, so only its width is compared with that of the data, not its weights.
    """
    where = {name: locate_encoder(name, source) for name, source in sources.items()}
    vae = load_vae(where["vae"], torch.float32)
    fingerprints = encoded.manifest.fingerprints | {
        "tokenizer": tokenizer_fingerprint(load_tokenizer(where["tokenizer"])),
        "vae": weights_fingerprint(vae, torch.float32),
    }
    _require_same_encoders(encoded.manifest.fingerprints, fingerprints)
    width = text_encoder_width(where["text_encoder"])
    if width != encoded.manifest.text_width:
        raise ValueError(
            f"{encoded.folder} has text states of {encoded.manifest.text_width} channels, but the "
            f"text encoder {sources['text_encoder']} has {width}. Encode the data again, or name "
            "the text encoder that encoded it."
        )
    return vae.to(memory_format=torch.channels_last)


def _require_same_encoders(expected: dict[str, str], given: dict[str, str]) -> None:
    different = [part for part, fingerprint in expected.items() if given[part] != fingerprint]
    if different:
        raise ValueError(
            f"The encoded data of two stages, or encoded data and the options, differ in "
            f"{' and '.join(different)}. Encode the data again, or name the models that encoded it."
        )


def make_state(args: argparse.Namespace, method: Method, accelerator: Accelerator) -> TrainingState:
    """Prepare the models of a method and their optimizers for the processes, and start averages."""
    engine, precision = accelerator.distributed_type, accelerator.mixed_precision
    if args.lora_rank is not None and engine == "DEEPSPEED":
        raise ValueError("--lora-rank is not supported with DeepSpeed: use DDP or FSDP2.")
    if args.optimizer == "adamw8bit" and engine == "FSDP":
        raise ValueError("--optimizer adamw8bit can't be split over processes: use DDP, or adamw.")
    if args.optimizer == "muon" and engine in ("FSDP", "DEEPSPEED"):
        raise ValueError(
            "--optimizer muon needs whole matrices, which FSDP2 and DeepSpeed split over "
            "processes: use DDP, or adamw."
        )
    if len(method.trained) > 1 and (engine == "DEEPSPEED" or precision == "fp16"):
        raise ValueError(
            f"{' and '.join(method.trained)} can't be trained together with DeepSpeed or in "
            "float16: use DDP or FSDP2, and --mixed-precision bf16 or no."
        )
    models = {}
    for name, bare in method.trained.items():
        optimizer = make_optimizer(
            trained_parameters(bare),
            args.optimizer,
            args.learning_rate,
            args.weight_decay,
            device=accelerator.device,
        )
        module, optimizer = processes.prepare(accelerator, bare, optimizer)
        device = "cpu" if args.ema_on_cpu else None
        average = None
        if name == TRANSFORMER:  # no other model is drawn with
            average = ExponentialMovingAverage(trained_parameters(module), args.ema_decay, device)
        profiles = {
            sigma_rel: PowerFunctionAverage(trained_parameters(module), sigma_rel, device)
            for sigma_rel in (SIGMA_RELS if args.post_hoc_ema and name == TRANSFORMER else ())
        }
        models[name] = TrainedModel(module, optimizer, average, profiles)
    dtype = processes.DTYPES.get(precision)
    metrics = Metrics(
        accelerator.device,
        accelerator.num_processes,
        peak_flops(accelerator.device, dtype or torch.float32),
    )
    return TrainingState(models, accelerator.scaler, metrics, Progress())
