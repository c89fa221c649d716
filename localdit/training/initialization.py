"""The models that a run starts from: a new transformer, loaded weights, a frozen teacher."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from localdit.checkpoint import inspect_checkpoint
from localdit.checkpoint.reading import few
from localdit.config import Config
from localdit.core.diffusion import (
    NOISE_SCHEDULE,
    NUM_TIMESTEPS,
    Objective,
    other_noise_schedule,
)
from localdit.core.encoders import locate_encoder
from localdit.core.latents import LatentFormat
from localdit.core.parts import vae_config
from localdit.core.samplers import flow_shift_of, prediction_type_of
from localdit.files import read_json
from localdit.models import PRESETS, LocalDiTTransformer2DModel
from localdit.models.configuration import public_arguments, require_sound_arguments
from localdit.models.conversion import transformer_folder
from localdit.parsing import say
from localdit.sizes import pipeline_around
from localdit.training.options import check_objective
from localdit.training.parser import LATE_OPTIONS, PREDICTION_TYPES
from localdit.training.state import TRANSFORMER, saved_options
from localdit.training.transfer import (
    initialize_latent_layers,
    is_pixart,
    latent_note,
    latent_shape,
    start_from_other_latents,
    start_from_pixart,
)

RELEASED = {
    "tokenizer": str(Config.text_encoder),
    "text_encoder": str(Config.text_encoder),
    "vae": str(Config.vae),
}


def encoder_sources(
    args: argparse.Namespace, otherwise: Mapping[str, str] = RELEASED
) -> dict[str, str]:
    """Return folder or hub name of tokenizer, text encoder and VAE.

    The option of a part comes before `--pretrained`, and that before `otherwise`.
    """
    named = {
        "tokenizer": args.tokenizer or args.text_encoder,
        "text_encoder": args.text_encoder,
        "vae": args.vae,
    }
    return {
        part: str(source or args.pretrained or otherwise[part]) for part, source in named.items()
    }


def latent_format(vae: str) -> LatentFormat:
    """Return the format of the latents of an autoencoder; only its configuration is read."""
    return LatentFormat.from_config(vae_config(locate_encoder("vae", vae)))


def transformer_config(
    args: argparse.Namespace, text_width: int | None = None, latents: LatentFormat | None = None
) -> dict[str, Any]:
    """Return the arguments of the transformer in the options. No weights are read.

    Args:
        text_width: channels of the text.
        latents: the latents to train on. A preset adapts to their channels and to `text_width`;
            while both are not known, channels are those of the options.
    """
    if args.transformer is None or is_pixart(args.transformer):
        shape = _shape(args.transformer_config)
        if latents is not None and args.transformer_config in PRESETS:
            channels = {"caption_channels": text_width, "in_channels": latents.channels}
            shape = shape | channels | {"out_channels": latents.channels}
        shape = {"out_channels": shape.get("in_channels", 4)} | shape
    elif args.transformer.is_dir():
        shape = public_arguments(transformer_folder(args.transformer)[1])
    else:
        shape = inspect_checkpoint(args.transformer).config
    if args.new_latents is None:
        return shape
    if latents is None:
        return shape | {"patch_size": args.new_latents}
    return shape | latent_shape(latents, args.new_latents)


def require_shape_used(args: argparse.Namespace) -> None:
    """Refuse `--transformer-config` beside weights that have a shape.

    Raises:
        ValueError: if `--transformer`, or the teacher that a student starts as, is a LocalDiT.
    """
    start, shape = args.transformer, args.transformer_config
    if shape is not None and start is not None and not is_pixart(start):
        raise ValueError(
            f"--transformer-config {shape} is for a transformer that is new or starts from a "
            f"PixArt, but this one starts from {start}, which has its own shape: leave it out."
        )


def load_transformer(
    args: argparse.Namespace,
    text_width: int,
    latents: LatentFormat,
    checkpoint: Path | None = None,
) -> LocalDiTTransformer2DModel:
    """Return the transformer to train, in float32: new, or with the weights of `--transformer`.

    Args:
        text_width: channels of the text.
        latents: the latents to train on.
        checkpoint: the checkpoint to resume from, if any; a scale of positions that was set for
            other latents stays as it is there, whatever sizes the run has now.
    """
    source, patch_size = args.transformer, args.new_latents
    if args.lora_rank is not None and is_pixart(source):
        raise ValueError(
            f"--transformer {source} is a PixArt, whose weights must all be trained to become a "
            "LocalDiT: leave out --lora-rank, or name a LocalDiT."
        )
    if source is None or is_pixart(source):
        transformer = LocalDiTTransformer2DModel(**transformer_config(args, text_width, latents))
        initialize_weights(transformer)
        if source is not None:
            report = start_from_pixart(transformer, source, patch_size is not None)
            if patch_size is not None:
                note = latent_note(transformer.config, latents.pixels_per_latent)
                report = replace(report, notes=(note,))
            say(str(report))
    else:
        transformer = _loaded(source)
        if patch_size is not None:
            largest = max(stage.image_size for stage in args.stages)
            kept = checkpoint and checkpoint / TRANSFORMER / "config.json"
            scale = read_json(kept)["interpolation_scale"] if kept and kept.is_file() else None
            transformer, report = start_from_other_latents(
                transformer, source, latents, patch_size, largest, scale
            )
            say(str(report))
    remedy = "set in_channels in --transformer-config, or choose another --vae"
    if source is not None:
        remedy = (
            "choose another --vae, or keep the weights that do not depend on the latents with "
            "--new-latents and the side of a patch"
        )
    _check_fit(transformer, text_width, latents.channels, remedy)
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    return transformer.train()


def load_frozen(source: Path, like: LocalDiTTransformer2DModel) -> LocalDiTTransformer2DModel:
    """Return a further transformer that a training method needs, in float32.

    Args:
        source: a Diffusers folder or a checkpoint file.
        like: the transformer in training; both see the same text and latents.
    """
    frozen = _loaded(source)
    remedy = "name a teacher of these latents"
    _check_fit(frozen, like.config.caption_channels, like.config.in_channels, remedy)
    return frozen


def _loaded(source: Path) -> LocalDiTTransformer2DModel:
    load = (
        LocalDiTTransformer2DModel.from_pretrained
        if source.is_dir()
        else LocalDiTTransformer2DModel.from_single_file
    )
    return load(source, torch_dtype=torch.float32)


def _shape(source: str | None) -> dict[str, Any]:
    """Return the arguments in a preset or a JSON file; without one, those of the default."""
    source = source or LATE_OPTIONS["transformer_config"]
    if source in PRESETS:
        return PRESETS[source]
    if not Path(source).is_file():
        raise ValueError(
            f"--transformer-config {source} is neither a file nor one of {', '.join(PRESETS)}."
        )
    shape = public_arguments(_read_json(Path(source), "--transformer-config"))
    signature = inspect.signature(LocalDiTTransformer2DModel.__init__)
    known = [*signature.parameters][1:]
    if unknown := [name for name in shape if name not in known]:
        raise ValueError(
            f"--transformer-config {source} has {few(unknown)}, which the transformer does not "
            f"take. It takes {', '.join(known)}."
        )
    try:
        require_sound_arguments(shape, signature)
    except ValueError as error:
        raise ValueError(f"--transformer-config {source}: {error}") from None
    return shape


def _read_json(path: Path, option: str) -> dict[str, Any]:
    """Return the object in a JSON file that belongs to what an option names."""
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{option}: {path} can't be read as JSON: {error}") from None


def settle_objective(args: argparse.Namespace, checkpoint: Path | None = None) -> str | None:
    """Set `args.prediction_type` and `args.flow_shift`, unless given, to those of the weights.

    A checkpoint has those of its run; `--transformer` counts beside it only if it stays frozen.
    Other weights have those of the scheduler of their pipeline, if any; its folder is beside
    theirs. New weights predict the noise, "epsilon".

    Args:
        checkpoint: the checkpoint that the run resumes from, if any.

    Returns:
        A message if the weights decided.

    Raises:
        ValueError: if weights and options contradict each other, or weights are for another noise
            schedule than that of training.
    """
    saved = saved_options(checkpoint / "training") if checkpoint is not None else {}
    named = {"--teacher": args.teacher}
    if checkpoint is None or args.lora_rank is not None:
        named["--transformer"] = args.transformer
    beside = {
        f"{option} {source}": scheduler
        for option, source in named.items()
        if source is not None and (scheduler := _scheduler_beside(source))
    }
    said = {
        name: kind
        for name, scheduler in beside.items()
        if (kind := prediction_type_of({"prediction_type": None} | scheduler)) is not None
    }
    if len(set(said.values())) > 1:
        both = " and ".join(f"{name} for {kind}" for name, kind in said.items())
        raise ValueError(
            f"The schedulers beside {both} differ: name weights that predict the same."
        )
    given = args.prediction_type or saved.get("prediction_type")
    for name, kind in said.items():
        if kind not in PREDICTION_TYPES:
            raise ValueError(
                f"{name} comes with a scheduler for {kind}, which can't be trained; expected "
                f"{', '.join(PREDICTION_TYPES)}."
            )
        if given not in (None, kind):
            raise ValueError(
                f"--prediction-type is {given}, but {name} comes with a scheduler for {kind}: give "
                f"--prediction-type {kind}."
            )
    for name, scheduler in beside.items():
        if other := other_noise_schedule(scheduler):
            settings = ", ".join(f"{setting} {value}" for setting, value in other.items())
            raise ValueError(
                f"{name} comes with a scheduler of another noise schedule ({settings}), which "
                f"can't be trained; expected {NOISE_SCHEDULE['beta_schedule']} betas from "
                f"{NOISE_SCHEDULE['beta_start']} to {NOISE_SCHEDULE['beta_end']}, "
                f"{NUM_TIMESTEPS} timesteps, and no zero terminal SNR."
            )
    args.prediction_type = given or next(iter(said.values()), "epsilon")
    check_objective(args)
    messages = []
    if given is None and said:
        messages.append(
            f"The prediction type is {args.prediction_type}: {next(iter(said))} comes with a "
            "scheduler for it."
        )
    if args.flow_shift is None:
        args.flow_shift = saved.get("flow_shift")
    if args.flow_shift is None:
        is_flow = args.prediction_type == "flow"
        shifts = {name: flow_shift_of(beside[name]) for name in said if is_flow}
        if len(set(shifts.values())) > 1:
            both = " and ".join(f"{name} ({shift:g})" for name, shift in shifts.items())
            raise ValueError(f"The schedulers beside {both} differ in shift: give --flow-shift.")
        args.flow_shift = next(iter(shifts.values()), 1.0)
        if args.flow_shift != 1:
            messages.append(
                f"The flow shift is {args.flow_shift:g}, that of the scheduler beside "
                f"{next(iter(shifts))}."
            )
    if args.teacher_steps is not None:
        try:
            Objective(args.prediction_type).require_grid(args.teacher_steps)
        except ValueError as error:
            raise ValueError(f"--teacher-steps: {error}.") from None
    return " ".join(messages) or None


def _scheduler_beside(transformer: Path) -> dict[str, Any]:
    """Return the configuration of the scheduler in the pipeline of a transformer; {} if none."""
    file = pipeline_around(transformer) / "scheduler/scheduler_config.json"
    return _read_json(file, str(transformer)) if file.is_file() else {}


def _check_fit(
    transformer: LocalDiTTransformer2DModel, text_width: int, latent_channels: int, remedy: str
) -> None:
    """Raise ValueError unless the transformer fits the channels of text and latents.

    Args:
        remedy: what to do about other latents, for the message.
    """
    wanted = transformer.config.caption_channels
    if wanted != text_width:
        raise ValueError(
            f"The transformer takes captions of {wanted} channels, the text encoder gives "
            f"{text_width}: set caption_channels in --transformer-config, or choose another "
            "--text-encoder."
        )
    wanted = transformer.config.in_channels
    if wanted != latent_channels:
        raise ValueError(
            f"The transformer takes latents of {wanted} channels, the VAE gives {latent_channels}: "
            f"{remedy}."
        )


@torch.no_grad()
def initialize_weights(transformer: LocalDiTTransformer2DModel) -> None:
    """Initialise a new transformer in place, like DiT (Peebles & Xie, 2023) and PixArt.

    Linear layers are Xavier-uniform with zero bias. Patch embedding and output layer start as
    `initialize_latent_layers` says. The embeddings of time and size, the AdaLN layer and the
    caption projection start with weights of standard deviation 0.02. The output of cross-attention
    and the relative position biases start at zero, so the untrained model, whose output layer is
    zero, predicts zero and ignores the text. Everything else keeps its initial values.
    """
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    initialize_latent_layers(transformer)
    for name, parameter in transformer.named_parameters():
        if name.startswith(("adaln_single.", "caption_projection.")) and name.endswith(".weight"):
            nn.init.normal_(parameter, std=0.02)
        if name.endswith(("attn2.to_out.0.weight", "rel_pos_bias")):
            nn.init.zeros_(parameter)
