"""The models that training works with, loaded from where the options say."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend

from localdit.training.initialization import initialize_weights

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import PreTrainedTokenizerBase, T5EncoderModel

    from localdit.models import LocalDiTTransformer2DModel


class Encoders(NamedTuple):
    """The frozen models that turn captions and pictures into what the transformer sees."""

    tokenizer: PreTrainedTokenizerBase
    text_encoder: T5EncoderModel
    vae: AutoencoderKL

    def to(self, device: torch.device | str) -> None:
        """Move both models."""
        self.text_encoder.to(device)
        self.vae.to(device)


def load_encoders(args: argparse.Namespace, text_dtype: torch.dtype) -> Encoders:
    """Load tokenizer, text encoder (in `text_dtype`) and VAE (in float32: SDXL's needs its range).

    Raises:
        OSError: if one is neither a folder here nor to be had from the hub.
    """
    from diffusers import AutoencoderKL
    from transformers import AutoTokenizer, T5EncoderModel

    tokenizer = args.pretrained or args.tokenizer or args.text_encoder
    text_encoder = args.pretrained or args.text_encoder
    vae = args.pretrained or args.vae
    encoders = Encoders(
        AutoTokenizer.from_pretrained(**_source(tokenizer, "tokenizer")),
        T5EncoderModel.from_pretrained(
            **_source(text_encoder, "text_encoder"), torch_dtype=text_dtype
        ),
        AutoencoderKL.from_pretrained(
            **_source(vae, "vae", hub_subfolder="vae"), torch_dtype=torch.float32
        ),
    )
    encoders.text_encoder.eval().requires_grad_(False)
    encoders.vae.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    return encoders


def _source(source: str | Path, part: str, hub_subfolder: str = "") -> dict[str, str]:
    """Arguments of `from_pretrained` for a folder (of the part, or of a pipeline) or a hub name."""
    folder = Path(source)
    found = {"pretrained_model_name_or_path": str(source)}
    if folder.is_dir():
        return found | {"subfolder": part if (folder / part).is_dir() else ""}
    return found | {"subfolder": hub_subfolder}


def load_transformer(args: argparse.Namespace) -> LocalDiTTransformer2DModel:
    """The transformer to train, in float32: `--transformer`, or a new one, initialised.

    Raises:
        ValueError: if `--transformer-config` is neither a preset nor a JSON file.
    """
    from localdit.models import LocalDiTTransformer2DModel

    if args.transformer is None:
        transformer = LocalDiTTransformer2DModel(**_transformer_shape(args.transformer_config))
        initialize_weights(transformer)
    elif args.transformer.is_dir():
        transformer = LocalDiTTransformer2DModel.from_pretrained(
            args.transformer, torch_dtype=torch.float32
        )
    else:
        transformer = LocalDiTTransformer2DModel.from_single_file(
            args.transformer, torch_dtype=torch.float32
        )
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    return transformer.train()


def _transformer_shape(source: str) -> dict[str, Any]:
    """The arguments that a preset's name or a JSON file stands for."""
    from localdit.models.presets import PRESETS

    if source in PRESETS:
        return PRESETS[source]
    path = Path(source)
    if not path.is_file():
        raise ValueError(
            f"--transformer-config {source} is neither a file nor one of {', '.join(PRESETS)}."
        )
    try:
        shape = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"--transformer-config {source} is no JSON file: {error}.") from None
    # A Diffusers config.json carries notes of its own beside the shape: `_class_name` and the like.
    return {name: value for name, value in shape.items() if not name.startswith("_")}


def check_fit(transformer: LocalDiTTransformer2DModel, encoders: Encoders) -> None:
    """Check that the transformer takes what the encoders give.

    Raises:
        ValueError: if widths differ.
    """
    wanted, given = transformer.config.caption_channels, encoders.text_encoder.config.d_model
    if wanted != given:
        raise ValueError(
            f"The transformer takes captions of {wanted} channels, the text encoder gives {given}: "
            "set caption_channels in --transformer-config, or choose another --text-encoder."
        )
    wanted, given = transformer.config.in_channels, encoders.vae.config.latent_channels
    if wanted != given:
        raise ValueError(
            f"The transformer takes latents of {wanted} channels, the VAE gives {given}: set "
            "in_channels in --transformer-config, or choose another --vae."
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
