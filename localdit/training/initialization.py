"""The models that a run starts from: a new transformer, loaded weights, a frozen teacher."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from localdit.checkpoint import inspect_checkpoint
from localdit.core.diffusion import prediction_type_of
from localdit.models import PRESETS, LocalDiTTransformer2DModel
from localdit.training.pixart import is_pixart, start_from_pixart


def encoder_sources(args: argparse.Namespace) -> dict[str, str]:
    """Return folder or hub name of tokenizer, text encoder and VAE, as the options say."""
    sources = {
        "tokenizer": args.pretrained or args.tokenizer or args.text_encoder,
        "text_encoder": args.pretrained or args.text_encoder,
        "vae": args.pretrained or args.vae,
    }
    return {part: str(source) for part, source in sources.items()}


def transformer_config(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of the transformer that the options ask for; no weights are read.

    Raises:
        ValueError: if `--transformer-config` is neither a preset nor a JSON file, or
            `--transformer` is no checkpoint.
    """
    if args.transformer is None or is_pixart(args.transformer):
        return _shape(args.transformer_config)
    if args.transformer.is_dir():
        return _json_shape(args.transformer / "config.json", "--transformer")
    return inspect_checkpoint(args.transformer).config


def load_transformer(
    args: argparse.Namespace, text_width: int, latent_channels: int
) -> LocalDiTTransformer2DModel:
    """Return the transformer to train, in float32: new, or with the weights of `--transformer`.

    Args:
        args: the options.
        text_width, latent_channels: channels of text and latents. A preset follows them.

    Raises:
        ValueError: if the options name nothing that can be trained, or it does not fit.
    """
    source = args.transformer
    if args.lora_rank is not None and is_pixart(source):
        raise ValueError(
            f"--transformer {source} is a PixArt, which has to be trained as a whole to become a "
            "LocalDiT: leave out --lora-rank, or name a LocalDiT."
        )
    if source is None or is_pixart(source):
        shape = _shape(args.transformer_config)
        if args.transformer_config in PRESETS:
            shape = shape | {
                "caption_channels": text_width,
                "in_channels": latent_channels,
                "out_channels": latent_channels,
            }
        shape.setdefault("out_channels", shape.get("in_channels", 4))
        transformer = LocalDiTTransformer2DModel(**shape)
        initialize_weights(transformer)
        if source is not None:
            print(start_from_pixart(transformer, source))
    else:
        transformer = _loaded(source)
    check_fit(transformer, text_width, latent_channels)
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    return transformer.train()


def load_teacher(
    args: argparse.Namespace, text_width: int, latent_channels: int
) -> LocalDiTTransformer2DModel:
    """Return the transformer that `--teacher` names, in float32.

    Raises:
        ValueError: if it does not fit the encoders, or predicts something else.
    """
    teacher = _loaded(args.teacher)
    check_fit(teacher, text_width, latent_channels)
    require_same_prediction(args.teacher, args.prediction_type, "--teacher")
    return teacher


def _loaded(source: Path) -> LocalDiTTransformer2DModel:
    load = (
        LocalDiTTransformer2DModel.from_pretrained
        if source.is_dir()
        else LocalDiTTransformer2DModel.from_single_file
    )
    return load(source, torch_dtype=torch.float32)


def _shape(source: str) -> dict[str, Any]:
    """Return the arguments in a preset or a JSON file."""
    if source in PRESETS:
        return PRESETS[source]
    if not Path(source).is_file():
        raise ValueError(
            f"--transformer-config {source} is neither a file nor one of {', '.join(PRESETS)}."
        )
    return _json_shape(Path(source), "--transformer-config")


def _json_shape(path: Path, option: str) -> dict[str, Any]:
    """Return the arguments in a JSON file, such as a Diffusers config.json."""
    try:
        shape = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{option}: {path} can't be read as JSON: {error}.") from None
    # A Diffusers config.json also holds entries such as `_class_name`.
    return {name: value for name, value in shape.items() if not name.startswith("_")}


def require_same_prediction(source: Path, prediction_type: str, option: str) -> None:
    """Refuse a transformer whose scheduler shows that it predicts something else.

    Adapters and a student learn what a model draws; they don't teach it to predict something else.

    Args:
        source: the transformer; its pipeline's scheduler is looked for beside it.
        prediction_type: of this run.
        option: the option that names `source`.

    Raises:
        ValueError: if the scheduler is made for another prediction type.
    """
    file = source / "../scheduler/scheduler_config.json"
    if not file.is_file():
        return
    config = json.loads(file.read_text(encoding="utf-8"))
    given = prediction_type_of({"prediction_type": prediction_type, **config})
    if given != prediction_type:
        raise ValueError(
            f"--prediction-type is {prediction_type}, but {option} {source} comes with a scheduler "
            f"for {given}: give --prediction-type {given}."
        )


def check_fit(
    transformer: LocalDiTTransformer2DModel, text_width: int, latent_channels: int
) -> None:
    """Check that the transformer fits the encoders.

    Raises:
        ValueError: if widths differ.
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
            "set in_channels in --transformer-config, or choose another --vae."
        )


@torch.no_grad()
def initialize_weights(transformer: LocalDiTTransformer2DModel) -> None:
    """Initialise a new transformer in place, as DiT (Peebles & Xie, 2023) and PixArt are.

    Linear layers are Xavier-uniform with zero bias, and so is the patch embedding, a convolution
    that acts as one. The embeddings of time and size, the AdaLN layer and the caption projection
    start with weights of standard deviation 0.02. Cross-attention's output, the output layer and
    the relative position biases start at zero: the untrained model predicts zero, and ignores the
    text. Everything else stays as it was constructed.
    """
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    patches = transformer.pos_embed.proj
    nn.init.xavier_uniform_(patches.weight.flatten(1))
    assert patches.bias is not None
    nn.init.zeros_(patches.bias)

    for name, parameter in transformer.named_parameters():
        if name.startswith(("adaln_single.", "caption_projection.")) and name.endswith(".weight"):
            nn.init.normal_(parameter, std=0.02)
        if name.endswith(("attn2.to_out.0.weight", "rel_pos_bias")):
            nn.init.zeros_(parameter)
    nn.init.zeros_(transformer.proj_out.weight)
