"""The models that training works with, loaded from where the options say."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend

from localdit.errors import FieldError, Vocabulary
from localdit.sources import TEXT_ENCODER, TOKENIZER, VAE, Part, locate
from localdit.training.initialization import initialize_weights
from localdit.training.pixart import is_pixart, start_from_pixart

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import PreTrainedTokenizerBase, T5EncoderModel

    from localdit.models import LocalDiTTransformer2DModel

PARTS = {"tokenizer": TOKENIZER, "text_encoder": TEXT_ENCODER, "vae": VAE}


class Encoders(NamedTuple):
    """The frozen models that turn captions and pictures into what the transformer sees."""

    tokenizer: PreTrainedTokenizerBase
    text_encoder: T5EncoderModel
    vae: AutoencoderKL

    def to(self, device: torch.device | str) -> None:
        """Move both models."""
        self.text_encoder.to(device)
        self.vae.to(device)


def encoder_sources(args: argparse.Namespace) -> dict[str, str]:
    """Folder or hub name of the tokenizer, the text encoder and the VAE, as the options say."""
    sources = {
        "tokenizer": args.pretrained or args.tokenizer or args.text_encoder,
        "text_encoder": args.pretrained or args.text_encoder,
        "vae": args.pretrained or args.vae,
    }
    return {part: str(source) for part, source in sources.items()}


def load_encoders(sources: dict[str, str], text_dtype: torch.dtype) -> Encoders:
    """Load tokenizer, text encoder (in `text_dtype`) and VAE (in float32: SDXL's needs its range).

    Raises:
        OSError: if one is neither a folder here nor to be had from the hub.
    """
    from diffusers import AutoencoderKL
    from transformers import AutoTokenizer, T5EncoderModel

    where = {name: _locate(name, source) for name, source in sources.items()}
    encoders = Encoders(
        AutoTokenizer.from_pretrained(**where["tokenizer"]),
        T5EncoderModel.from_pretrained(**where["text_encoder"], torch_dtype=text_dtype),
        AutoencoderKL.from_pretrained(**where["vae"], torch_dtype=torch.float32),
    )
    encoders.text_encoder.eval().requires_grad_(False)
    encoders.vae.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    return encoders


def encoder_folders(sources: dict[str, str]) -> dict[str, Path]:
    """The folders in which tokenizer, text encoder and VAE lie on this machine.

    Raises:
        OSError: if one is neither a folder here nor to be had from the hub.
    """
    from huggingface_hub import hf_hub_download

    folders = {}
    for name, source in sources.items():
        where = _locate(name, source)
        folder = Path(where["pretrained_model_name_or_path"]) / where["subfolder"]
        if not folder.is_dir():
            config = hf_hub_download(
                source, PARTS[name].config, subfolder=where["subfolder"] or None
            )
            folder = Path(config).parent
        folders[name] = folder.resolve()
    return folders


def tokenizer_class(sources: dict[str, str]) -> str:
    """Name of the tokenizer's class in Transformers."""
    from transformers import AutoTokenizer

    return type(
        AutoTokenizer.from_pretrained(**_locate("tokenizer", sources["tokenizer"]))
    ).__name__


def _locate(name: str, source: str) -> dict[str, str]:
    part: Part = PARTS[name]
    try:
        return locate(part, source)
    except FieldError as error:
        options = {part.field: f"--{name.replace('_', '-')}"}
        raise OSError(error.worded(Vocabulary(options, "give {name} {value}"))) from error


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
