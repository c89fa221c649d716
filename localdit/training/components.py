"""The models that training works with, loaded from where the options say."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention import SDPBackend

from localdit.training.initialization import initialize_weights
from localdit.training.pixart import is_pixart, start_from_pixart

if TYPE_CHECKING:
    from localdit.models import LocalDiTTransformer2DModel


def encoder_sources(args: argparse.Namespace) -> dict[str, str]:
    """Folder or hub name of the tokenizer, the text encoder and the VAE, as the options say."""
    sources = {
        "tokenizer": args.pretrained or args.tokenizer or args.text_encoder,
        "text_encoder": args.pretrained or args.text_encoder,
        "vae": args.pretrained or args.vae,
    }
    return {part: str(source) for part, source in sources.items()}


def transformer_config(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of the transformer that the options ask for; no weights are read.

    Raises:
        ValueError: if `--transformer-config` is neither a preset nor a JSON file, or
            `--transformer` is no checkpoint.
    """
    if args.transformer is None or is_pixart(args.transformer):
        return _shape(args.transformer_config)
    if args.transformer.is_dir():
        return _json_shape(args.transformer / "config.json", "--transformer")
    from localdit.checkpoint import inspect_checkpoint

    return inspect_checkpoint(args.transformer).config


def load_transformer(args: argparse.Namespace) -> LocalDiTTransformer2DModel:
    """The transformer to train, in float32: a new one, or one that starts from `--transformer`.

    Raises:
        ValueError: if the options name nothing that can be trained.
    """
    from localdit.models import LocalDiTTransformer2DModel

    source = args.transformer
    if args.lora_rank is not None and is_pixart(source):
        raise ValueError(
            f"--transformer {source} is a PixArt, which has to be trained as a whole to become a "
            "LocalDiT: leave out --lora-rank, or name a LocalDiT."
        )
    if source is None or is_pixart(source):
        transformer = LocalDiTTransformer2DModel(**_shape(args.transformer_config))
        initialize_weights(transformer)
        if source is not None:
            print(start_from_pixart(transformer, source))
    elif source.is_dir():
        transformer = LocalDiTTransformer2DModel.from_pretrained(source, torch_dtype=torch.float32)
    else:
        transformer = LocalDiTTransformer2DModel.from_single_file(source, torch_dtype=torch.float32)
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    return transformer.train()


def _shape(source: str) -> dict[str, Any]:
    """The arguments that a preset's name or a JSON file stands for."""
    from localdit.models.presets import PRESETS

    if source in PRESETS:
        return PRESETS[source]
    if not Path(source).is_file():
        raise ValueError(
            f"--transformer-config {source} is neither a file nor one of {', '.join(PRESETS)}."
        )
    return _json_shape(Path(source), "--transformer-config")


def _json_shape(path: Path, option: str) -> dict[str, Any]:
    """The arguments in a JSON file, such as a Diffusers config.json."""
    try:
        shape = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{option}: {path} can't be read as JSON: {error}.") from None
    # A Diffusers config.json carries notes of its own beside the shape: `_class_name` and the like.
    return {name: value for name, value in shape.items() if not name.startswith("_")}


def check_fit(
    transformer: LocalDiTTransformer2DModel, text_width: int, latent_channels: int
) -> None:
    """Check that the transformer takes what the encoders give.

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


def attention_kernels(device: torch.device, mixed_precision: str) -> list[SDPBackend]:
    """Which of PyTorch's attention kernels to train with: all, but for the CPU in bfloat16.

    There the fused one takes several times as long to differentiate as plain matrix products.
    """
    if device.type == "cpu" and mixed_precision == "bf16":
        return [SDPBackend.MATH]
    return [
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.MATH,
    ]
